"""Input of ``prepare``, and the documents in the shards that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jepa_dist.data.shards import find_shards, read_shard

BOS = 256


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    """Write a line of JSON for each text."""
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts))


def tokens_of(out: Path, split: str) -> list[int]:
    """Return the tokens of all shards of a split."""
    shards = find_shards(str(out / f"{split}_*.bin"), "test")
    return np.concatenate([read_shard(path) for path in shards]).tolist()


def documents_of(out: Path, split: str) -> list[bytes]:
    """Return the texts of a prepared split, decoded from its tokens."""
    text = tokens_of(out, split)
    starts = [i for i, token in enumerate(text) if token == BOS]
    assert starts[0] == 0
    return [
        bytes(text[start + 1 : stop])
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)
    ]


def prepared(out: Path) -> dict[str, bytes]:
    """Return the contents of all files by name."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
