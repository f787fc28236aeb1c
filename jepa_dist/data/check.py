"""Whether the data fit the configuration, before any process group exists (contract C7)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jepa_dist.config import Config
from jepa_dist.data.meta import read_meta
from jepa_dist.data.shards import find_shards, num_windows, read_count
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
        tokenizer = load_tokenizer(config.data.tokenizer)
    except UserError as error:
        problems += [f"data.tokenizer: {problem}" for problem in error.problems]
    else:
        problems += _vocabulary_problems(config, tokenizer)
    if problems:
        raise UserError(*problems)


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


def _vocabulary_problems(config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    data, expected = config.data, config.model.vocab_size
    if tokenizer.vocab_size != expected:
        yield (
            f"data.tokenizer={data.tokenizer!r}: has {tokenizer.vocab_size} ids, but "
            f"model.vocab_size={expected}; set model.vocab_size={tokenizer.vocab_size} or name "
            "the tokenizer of the data"
        )
    for key, pattern in (("data.train", data.train), ("data.val", data.val)):
        meta = read_meta(pattern)
        if meta and meta["vocab_size"] != expected:
            yield (
                f"{key}={pattern!r}: {_meta_name(pattern)} says vocab_size={meta['vocab_size']}, "
                f"but model.vocab_size={expected}"
            )
        if meta and meta["tokenizer"] != tokenizer.name:
            yield (
                f"{key}={pattern!r}: {_meta_name(pattern)} says the tokenizer was "
                f"{meta['tokenizer']!r}, but data.tokenizer={data.tokenizer!r} is "
                f"{tokenizer.name!r}"
            )


def _meta_name(pattern: str) -> str:
    return str(Path(pattern).parent / "meta.json")
