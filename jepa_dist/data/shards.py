"""Token shards in the field's .bin format.

A shard is 256 little-endian int32 words (magic, version, number of tokens, zeros) followed by
that many little-endian uint16 token ids. Shards made for modded-nanogpt, llm.c or parameter-golf
are read as they are.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jepa_dist.errors import UserError

HEADER_WORDS = 256
MAGIC = 20240520
VERSION = 1

Tokens = npt.NDArray[np.uint16]

_HEADER_BYTES = HEADER_WORDS * 4
_TOKEN_BYTES = 2
_SAMPLED_BLOCKS = 8
_SAMPLED_BYTES = 4096


class ShardWriter:
    """Writes one shard piece by piece; the file appears under its name only when it is whole.

    A context manager: leaving it normally publishes the shard, an exception removes the
    temporary file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(bytes(_HEADER_BYTES))

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append token ids (integers in 0..65535)."""
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self.count += len(tokens)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink()
            return
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.count
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)


def write_shard(path: Path, tokens: npt.NDArray[Any]) -> None:
    """Write ``tokens`` (integers in 0..65535) as one shard, atomically."""
    with ShardWriter(path) as writer:
        writer.write(tokens)


def read_count(path: Path) -> int:
    """Number of tokens in a shard, from its validated header.

    Raises:
        UserError: unreadable file, wrong magic or version, or a length unlike the header's count.
    """
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(_HEADER_BYTES), dtype="<i4")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read the token shard: {error.strerror}") from None
    problem = _header_problem(header, size)
    if problem:
        raise UserError(
            f"{path}: {problem}; prepare the data again (python -m jepa_dist.data.prepare) "
            "or replace this file with an intact copy"
        )
    return int(header[2])


def _header_problem(header: npt.NDArray[np.int32], size: int) -> str | None:
    if size < _HEADER_BYTES:
        return f"{size} bytes are too few for a token shard, whose header has {_HEADER_BYTES}"
    magic, version, count = (int(word) for word in header[:3])
    if magic != MAGIC:
        return f"not a token shard: expected magic {MAGIC}, found {magic}"
    if version != VERSION:
        return f"token shard of version {version}, expected {VERSION}"
    expected = _HEADER_BYTES + _TOKEN_BYTES * count
    if size != expected:
        return f"the header promises {count} tokens ({expected} bytes), the file has {size} bytes"
    return None


def read_shard(path: Path) -> Tokens:
    """The tokens of a shard as a read-only memory map, uint16 [count].

    Raises:
        UserError: as ``read_count``.
    """
    count = read_count(path)
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=_HEADER_BYTES, shape=(count,))


def num_windows(count: int, seq_len: int) -> int:
    """Windows of seq_len+1 tokens at stride seq_len in a shard of ``count`` tokens."""
    return max(0, count - 1) // seq_len


def check_ids(path: Path, ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary.

    Args:
        path: Shard they were read from, for the error message.
        ids: Integers, any shape, at least one.
        vocab_size: Number of legal ids.

    Raises:
        UserError: an id of ``vocab_size`` or more.
    """
    if ids.max() >= vocab_size:
        raise UserError(
            f"{path}: holds token id {ids.max()}, but model.vocab_size={vocab_size}; set "
            "model.vocab_size to that of the shards, or prepare the data again"
        )


def find_shards(pattern: str, key: str) -> list[Path]:
    """The files a glob pattern stands for, sorted by name.

    Args:
        pattern: Glob, ``~`` and ``**`` included.
        key: Configuration key it came from, for the error message.

    Raises:
        UserError: no file matches.
    """
    paths = sorted(
        Path(name)
        for name in glob.glob(os.path.expanduser(pattern), recursive=True)
        if os.path.isfile(name)
    )
    if not paths:
        raise UserError(
            f"{key}={pattern!r}: no token shard matches (looked from {os.getcwd()}); "
            "python -m jepa_dist.data.prepare makes the default corpus"
        )
    return paths


def fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    """What identifies a data set, as plain JSON data.

    ``files`` holds each shard's name (without folders), bytes, tokens and a digest over its
    header and a few evenly spaced blocks; ``digest`` is over all of that, ``tokens`` the sum.

    Raises:
        UserError: a shard is damaged.
    """
    files = [_file_fingerprint(path) for path in paths]
    whole = hashlib.blake2b(repr(files).encode(), digest_size=16)
    tokens = sum(file["tokens"] for file in files)
    return {"digest": whole.hexdigest(), "tokens": tokens, "files": files}


def _file_fingerprint(path: Path) -> dict[str, Any]:
    count = read_count(path)
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(_HEADER_BYTES))
        last = max(_HEADER_BYTES, size - _SAMPLED_BYTES)
        for block in range(_SAMPLED_BLOCKS):
            file.seek(_HEADER_BYTES + (last - _HEADER_BYTES) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_SAMPLED_BYTES))
    return {"name": path.name, "bytes": size, "tokens": count, "digest": digest.hexdigest()}
