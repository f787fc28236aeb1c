"""Check the data against the configuration, before any process group exists (early errors)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jepa_dist.config import Config
from jepa_dist.data.meta import metas_beside, read_meta
from jepa_dist.data.shards import Shard, read_count, same_contents
from jepa_dist.data.sources import epoch_problems, find_sources, find_split, training_order
from jepa_dist.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from jepa_dist.errors import UserError

# Number of tokens at the start of a shard that are searched for an id.
_SEARCHED_TOKENS = 1 << 26
_SEARCH_STEP = 1 << 20


def check_data(config: Config) -> None:
    """Check every shard's header, meta.json and the tokenizer.

    Raises:
        UserError: missing or damaged shards, a split without one whole window, validation shards
            among the training shards, a tokenizer or data whose vocabulary differs from the
            model's; all problems at once.
    """
    problems = [*_split_problems(config, "train"), *_split_problems(config, "val")]
    if not problems:
        problems += _overlap_problems(config)
        try:
            tokenizer = load_checked_tokenizer(config, ("train", "val"))
        except UserError as error:
            problems += error.problems
    elif config.data.tokenizer is not None:
        problems += _tokenizer_problems(config)
    if not problems:
        problems += _byte_problems(config)
        problems += epoch_problems(config, training_order(config))
    if not problems and config.documents_key is not None:
        problems += _boundary_problems(config, tokenizer)
    if problems:
        raise UserError(*problems)


def with_bos(config: Config) -> Config:
    """Return a configuration with the id that begins documents, if the model needs it.

    The model can then be run from what the run stores, without the data.
    """
    if not config.model.document_mask:
        return config
    bos_id = known_bos(config, load_checked_tokenizer(config, ("train",)))
    data = config.data.model_copy(update={"bos_id": bos_id})
    return config.model_copy(update={"data": data})


def known_bos(config: Config, tokenizer: Tokenizer | None) -> int | None:
    """Return the id that begins every document of the training data; None if unknown.

    Sources in order of precedence: ``data.bos_id``, meta.json of prepared shards, the tokenizer.

    Raises:
        UserError: unknown, but an option needs it.
    """
    if config.data.bos_id is not None:
        return config.data.bos_id
    metas = metas_beside(find_split(config, "train")).items()
    said = {meta.bos_id: path for path, meta in metas if meta.bos_id is not None}
    if len(said) > 1:
        raise UserError(
            f"{_label(config, 'train')}: its shards begin documents with different ids: "
            f"{', '.join(f'{bos} in {path}' for bos, path in said.items())}; name the shards of "
            "one tokenizer"
        )
    if said:
        return next(iter(said))
    if tokenizer is not None:
        return tokenizer.bos_id
    if config.documents_key is not None:
        raise UserError(
            f"{config.documents_key}=true: nothing says which id begins a document in "
            f"{_label(config, 'train')}; set data.bos_id (50256 in GPT-2 shards), or name "
            "the tokenizer of the data (data.tokenizer)"
        )
    return None


def load_checked_tokenizer(config: Config, splits: Iterable[str]) -> Tokenizer | None:
    """Return the configured tokenizer, checked against model and data; None if unset.

    Raises:
        UserError: it cannot be loaded, or the vocabulary of model or data differs.
    """
    tokenizer = None
    problems: list[str] = []
    if config.data.tokenizer is not None:
        try:
            tokenizer = _load_tokenizer(config)
            problems += _vocabulary_problems(config, tokenizer)
        except UserError as error:
            problems += error.problems
    for split in splits:
        problems += _meta_problems(config, split, tokenizer)
    if problems:
        raise UserError(*problems)
    return tokenizer


def _load_tokenizer(config: Config) -> Tokenizer:
    """Return the configured tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    assert config.data.tokenizer is not None
    try:
        return load_tokenizer(config.data.tokenizer)
    except UserError as error:
        raise UserError(*(f"data.tokenizer: {problem}" for problem in error.problems)) from None


def _vocabulary_problems(config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    if tokenizer.vocab_size != config.model.vocab_size:
        yield (
            f"data.tokenizer={config.data.tokenizer!r}: has {tokenizer.vocab_size} ids, but "
            f"model.vocab_size={config.model.vocab_size}; set "
            f"model.vocab_size={tokenizer.vocab_size} or name the tokenizer of the data"
        )


def _tokenizer_problems(config: Config) -> Iterator[str]:
    try:
        yield from _vocabulary_problems(config, _load_tokenizer(config))
    except UserError as error:
        yield from error.problems


def _label(config: Config, split: str) -> str:
    """Return key and pattern of a split, for messages; only the key of a list of sources."""
    pattern = getattr(config.data, split)
    return f"data.{split}={pattern!r}" if isinstance(pattern, str) else f"data.{split}"


def _split_problems(config: Config, split: str) -> Iterator[str]:
    """Yield problems of a split's sources: shards that cannot be read, or are too small.

    Training windows are inside a shard, validation windows cross the shards of a source.
    """
    try:
        sources = find_sources(config, split)
    except UserError as error:
        yield from error.problems
        return
    for source in sources:
        try:
            counts = [read_count(path) for path in source.paths]
        except UserError as error:
            yield from error.problems
            continue
        yield from _length_problems(config, split, source.label, counts)


def _length_problems(config: Config, split: str, label: str, counts: list[int]) -> Iterator[str]:
    needed = config.model.seq_len + 1
    if split == "val" and sum(counts) < needed:
        yield (
            f"{label}: its {sum(counts)} tokens do not fill one window of model.seq_len "
            f"+ 1 = {needed} tokens; use more text or a smaller model.seq_len"
        )
    if split == "train" and max(counts) < needed:
        yield (
            f"{label}: no shard holds one window of model.seq_len + 1 = {needed} tokens "
            f"(the largest has {max(counts)}); use more text or a smaller model.seq_len"
        )


def _overlap_problems(config: Config) -> Iterator[str]:
    """Yield a problem if a validation shard is trained on: the same file, or the same tokens."""
    train, val = find_split(config, "train"), find_split(config, "val")
    by_file = {path.resolve(): path for path in train}
    by_start: dict[tuple[int, bytes], list[Path]] = {}
    for path in train:
        by_start.setdefault(_start_of(path), []).append(path)
    for path in val:
        same = by_file.get(path.resolve()) or next(
            (other for other in by_start.get(_start_of(path), []) if same_contents(path, other)),
            None,
        )
        if same is not None and read_count(path) > 0:
            yield (
                f"data.val: {path} is also trained on (data.train matches {same}, the same "
                "tokens); keep validation shards out of data.train"
            )
            return


def _start_of(path: Path) -> tuple[int, bytes]:
    """Return the number of tokens, and the first of them as bytes."""
    shard = Shard(path)
    start = shard.read(0, min(shard.count, 1024)).astype(np.int64)  # shards may differ in type
    return shard.count, start.tobytes()


def _byte_problems(config: Config) -> Iterator[str]:
    """Yield a problem if shards without a meta.json are of another byte tokenizer."""
    if config.data.tokenizer != BYTES:
        return
    for source in (*find_sources(config, "train"), *find_sources(config, "val")):
        path = source.paths[0]
        if read_meta(path.parent) is not None:
            continue
        shard = Shard(path)
        ids = set(np.unique(shard.read(0, min(shard.count, _SEARCH_STEP))).tolist())
        # Text has spaces and line ends; the bytes that these ids mean in the other mapping (28 and
        # 6) do not occur in text.
        if {1, ord(" ") + 4, ord("\n") + 4} <= ids and not {256, ord(" "), ord("\n")} & ids:
            yield (
                f"data.tokenizer={BYTES!r}: {path} is of another byte tokenizer, of 260 ids (1 "
                "begins a document, byte b is id b + 4); prepare the text again, or train on it "
                "with data.tokenizer=null model.vocab_size=260 data.bos_id=1"
            )
            return


def _boundary_problems(config: Config, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield a problem if an option needs document boundaries and the data show none."""
    try:
        bos_id = known_bos(config, tokenizer)
    except UserError as error:
        yield from error.problems
        return
    shard = Shard(find_split(config, "train")[0])
    searched = min(shard.count, _SEARCHED_TOKENS)
    starts = range(0, searched, _SEARCH_STEP)
    if not any((shard.read(n, min(n + _SEARCH_STEP, searched)) == bos_id).any() for n in starts):
        place = "" if searched == shard.count else f"the first {searched} tokens of "
        yield (
            f"{config.documents_key}=true: no document begins in {place}{shard.path}: id "
            f"{bos_id} does not occur; set data.bos_id to the one that begins documents, or "
            "disable the option"
        )


def _meta_problems(config: Config, split: str, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield differences between meta.json of prepared shards and model or tokenizer."""
    expected = config.model.vocab_size
    try:
        metas = metas_beside(find_split(config, split))
    except UserError as error:
        yield from error.problems
        return
    for path, meta in metas.items():
        prefix = f"{_label(config, split)}: {path} says"
        if meta.vocab_size != expected:
            yield f"{prefix} vocab_size={meta.vocab_size}, but model.vocab_size={expected}"
        if tokenizer is not None and meta.tokenizer != tokenizer.name:
            yield (
                f"{prefix} the tokenizer was {meta.tokenizer!r}, but "
                f"data.tokenizer={config.data.tokenizer!r} is {tokenizer.name!r}"
            )
