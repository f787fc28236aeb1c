"""Report on a prepared folder: documents, tokens, bytes per token, lengths of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jepa_dist.data.meta import Meta
from jepa_dist.data.shards import Shard

_BLOCK_TOKENS = 1 << 20


def report(folder: Path, meta: Meta) -> dict[str, Any]:
    """Read the shards of a folder once, in little memory.

    Returns:
        By split: ``documents``, ``tokens``, ``text_bytes``, ``bytes_per_token``, and for the
        documents' lengths in tokens (including BOS) ``mean_length``, ``longest`` and ``lengths``:
        number of documents up to each power of two.

    Raises:
        UserError: a damaged shard.
    """
    splits = {}
    for split, documents in meta.documents.items():
        names = sorted(name for name in meta.shards if name.startswith(f"{split}_"))
        lengths: Counter[int] = Counter()
        longest = 0
        for length in _lengths([folder / name for name in names], meta.bos_id):
            lengths[1 << (length - 1).bit_length()] += 1
            longest = max(longest, length)
        tokens, text_bytes = meta.tokens.get(split, 0), meta.text_bytes.get(split, 0)
        splits[split] = {
            "documents": documents,
            "tokens": tokens,
            "text_bytes": text_bytes,
            "bytes_per_token": round(text_bytes / max(1, tokens), 4),
            "mean_length": round(tokens / max(1, documents), 2),
            "longest": longest,
            "lengths": {str(most): lengths[most] for most in sorted(lengths)},
        }
    return splits


def _lengths(paths: list[Path], bos_id: int | None) -> Iterator[int]:
    """Yield the number of tokens of each document of consecutive shards."""
    begun, offset = -1, 0
    for path in paths:
        shard = Shard(path)
        for start in range(0, shard.count, _BLOCK_TOKENS):
            ids = shard.read(start, min(start + _BLOCK_TOKENS, shard.count))
            for place in (np.flatnonzero(ids == bos_id) + offset).tolist():
                if begun >= 0:
                    yield place - begun
                begun = place
            offset += len(ids)
    if begun >= 0:
        yield offset - begun


def table(splits: dict[str, Any]) -> str:
    """Return the report as lines of text."""
    lines = []
    for split, found in splits.items():
        lines.append(
            f"{split}: {found['documents']:,} documents, {found['tokens']:,} tokens, "
            f"{found['bytes_per_token']:.3f} bytes per token, mean length "
            f"{found['mean_length']:,.1f}, longest {found['longest']:,}"
        )
        for most, count in found["lengths"].items():
            share = count / max(1, found["documents"])
            bar = "#" * round(40 * share)
            lines.append(f"  up to {int(most):>12,} tokens {count:>12,}  {share:6.1%} {bar}")
    return "\n".join(lines)
