"""Whether the data fit the configuration, before any process group exists (contract C7)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from jepa_dist.config import Config
from jepa_dist.data.meta import read_meta
from jepa_dist.data.shards import find_shards, num_windows, read_count, read_shard
from jepa_dist.data.tokenizer import Tokenizer, load_tokenizer
from jepa_dist.errors import UserError


def check_data(config: Config) -> None:
    """Look at every shard's header, at meta.json and at the tokenizer.

    Raises:
        UserError: missing or damaged shards, a split without one whole window, a tokenizer or
            data of another vocabulary than the model's; all of it at once.
    """
    problems = [*_split_problems(config, "train"), *_split_problems(config, "val")]
    try:
        tokenizer = load_checked_tokenizer(config, ("train", "val"))
    except UserError as error:
        problems += error.problems
    if not problems and config.jepa.within_documents:
        problems += _boundary_problems(config, tokenizer)
    if problems:
        raise UserError(*problems)


def known_bos(config: Config, tokenizer: Tokenizer | None) -> int | None:
    """The id that begins every document of the training data; None if nothing says.

    What ``data.bos_id`` says counts most, then the note beside prepared shards, then the tokenizer.

    Raises:
        UserError: nothing says, but spans are to keep within documents.
    """
    if config.data.bos_id is not None:
        return config.data.bos_id
    meta = read_meta(config.data.train)
    if meta is not None and "bos_id" in meta:
        return int(meta["bos_id"])
    if tokenizer is not None:
        return tokenizer.bos_id
    if config.jepa.within_documents:
        raise UserError(
            "jepa.within_documents=true: nothing says which id begins a document in "
            f"data.train={config.data.train!r}; set data.bos_id (50256 in GPT-2 shards), or name "
            "the tokenizer of the data (data.tokenizer)"
        )
    return None


def load_checked_tokenizer(config: Config, splits: Iterable[str]) -> Tokenizer | None:
    """The configured tokenizer, known to be the model's and that of the data; None if unset.

    Raises:
        UserError: it cannot be loaded, or the model's or the data's vocabulary is another.
    """
    data, vocab_size = config.data, config.model.vocab_size
    tokenizer = None
    problems = []
    if data.tokenizer is not None:
        try:
            tokenizer = load_tokenizer(data.tokenizer)
        except UserError as error:
            problems += [f"data.tokenizer: {problem}" for problem in error.problems]
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        problems.append(
            f"data.tokenizer={data.tokenizer!r}: has {tokenizer.vocab_size} ids, but "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size} or name "
            "the tokenizer of the data"
        )
    for split in splits:
        problems += _meta_problems(config, split, tokenizer)
    if problems:
        raise UserError(*problems)
    return tokenizer


def _split_problems(config: Config, split: str) -> Iterator[str]:
    pattern, key = getattr(config.data, split), f"data.{split}"
    try:
        counts = [read_count(path) for path in find_shards(pattern, key)]
    except UserError as error:
        yield from error.problems
        return
    if not any(num_windows(count, config.model.seq_len) for count in counts):
        yield (
            f"{key}={pattern!r}: no shard holds one window of model.seq_len + 1 = "
            f"{config.model.seq_len + 1} tokens (the largest has {max(counts)}); "
            "use more text or a smaller model.seq_len"
        )


def _boundary_problems(config: Config, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Whether the boundaries can be seen that spans are to keep within."""
    try:
        bos_id = known_bos(config, tokenizer)
    except UserError as error:
        yield from error.problems
        return
    shard = find_shards(config.data.train, "data.train")[0]
    if not (read_shard(shard) == bos_id).any():
        yield (
            f"jepa.within_documents=true: no document begins in {shard}: id {bos_id} does not "
            "occur; set data.bos_id to the one that begins documents, or leave the option off"
        )


def _meta_problems(config: Config, split: str, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What the note beside prepared shards says, against model and tokenizer."""
    pattern, expected = getattr(config.data, split), config.model.vocab_size
    meta = read_meta(pattern)
    if not meta:
        return
    told = f"data.{split}={pattern!r}: {_meta_name(pattern)} says"
    if meta["vocab_size"] != expected:
        yield f"{told} vocab_size={meta['vocab_size']}, but model.vocab_size={expected}"
    if tokenizer is not None and meta["tokenizer"] != tokenizer.name:
        yield (
            f"{told} the tokenizer was {meta['tokenizer']!r}, but "
            f"data.tokenizer={config.data.tokenizer!r} is {tokenizer.name!r}"
        )


def _meta_name(pattern: str) -> str:
    return str(Path(pattern).parent / "meta.json")
