"""Show the contents of token shards: ``jepa_dist inspect SHARD ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepa_dist.command_line import Parser, end_with_reader, program
from jepa_dist.data.meta import read_meta
from jepa_dist.data.shards import Shard, find_shards
from jepa_dist.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from jepa_dist.errors import UserError

_BLOCK_TOKENS = 1 << 20
_SHOWN_TOKENS = 1 << 10
_SHOWN_CHARACTERS = 600
_TOKENIZER_NAME = "tokenizer.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code (2 for a user's mistake)."""
    try:
        options = _parser().parse_args(argv)
        with end_with_reader():
            for pattern in options.shards:
                for path in find_shards(pattern, "SHARD"):
                    _show(path, options)
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("jepa_dist.data.inspect_shards"),
        description="Show counts and the first documents of token shards.",
    )
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARD", help="a shard, or a pattern in quotes")
    add(
        "--tokenizer",
        help="as data.tokenizer (default: from meta.json and tokenizer.json in the shard's folder)",
    )
    add("--bos-id", type=int, help="id that begins documents (default: the tokenizer's)")
    add("--documents", type=int, default=3, help="documents of each shard that are shown (3)")
    return parser


def _show(path: Path, options: argparse.Namespace) -> None:
    shard, meta = Shard(path), read_meta(path.parent)
    name = None if meta is None else meta.tokenizer
    tokenizer = _tokenizer(path.parent, options.tokenizer, name)
    bos_id = options.bos_id
    if bos_id is None and meta is not None:
        bos_id = meta.bos_id
    if bos_id is None and tokenizer is not None:
        bos_id = tokenizer.bos_id
    summary = summarize(shard, bos_id, max(0, options.documents))
    documents = "" if bos_id is None else f", {summary.documents:,} documents"
    print(
        f"{path}: {shard.count:,} tokens ({shard.dtype.name}), ids {summary.least}.."
        f"{summary.most}{documents}"
    )
    for number, (start, stop) in enumerate(summary.first, 1):
        ids = shard.read(start, min(stop, start + _SHOWN_TOKENS)).tolist()
        print(f"  document {number}: tokens {start:,} to {stop - 1:,}")
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        for line in _visible(text):
            print(f"    {line}")


def _tokenizer(folder: Path, spec: str | None, name: str | None) -> Tokenizer | None:
    """Return the requested tokenizer, or else the one that made the shards, if available."""
    if spec is not None:
        return load_tokenizer(spec)
    if name == BYTES:
        return load_tokenizer(BYTES)
    beside = folder / _TOKENIZER_NAME
    return load_tokenizer(str(beside)) if beside.exists() else None


@dataclass
class Summary:
    """Contents of a shard; the first documents as token ranges, without their first id."""

    least: int
    most: int
    documents: int
    first: list[tuple[int, int]]


def summarize(shard: Shard, bos_id: int | None, documents: int) -> Summary:
    """Read a shard once, in little memory.

    Args:
        shard: The shard.
        bos_id: Id that begins every document; None: no documents.
        documents: Number of documents to locate.

    Raises:
        UserError: it cannot be read.
    """
    least, most, found = sys.maxsize, 0, 0
    starts: list[int] = []
    for offset in range(0, shard.count, _BLOCK_TOKENS):
        ids = shard.read(offset, min(offset + _BLOCK_TOKENS, shard.count))
        least, most = min(least, int(ids.min())), max(most, int(ids.max()))
        if bos_id is not None:
            places = np.flatnonzero(ids == bos_id)
            found += len(places)
            starts += (places[: documents + 1 - len(starts)] + offset).tolist()
    ends = [*starts[1:], shard.count]
    first = [(start + 1, end) for start, end in zip(starts, ends, strict=False)][:documents]
    return Summary(min(least, most), most, found, first)


def _visible(text: str) -> Iterator[str]:
    """Yield the first lines of a text, without control codes."""
    shown = text[:_SHOWN_CHARACTERS]
    for line in shown.splitlines():
        yield "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(shown) < len(text):
        yield "..."


if __name__ == "__main__":
    sys.exit(main())
