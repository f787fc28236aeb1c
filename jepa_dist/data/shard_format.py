"""File formats of token shards: those that are read, and those with a specific error."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa_dist.errors import UserError
from jepa_dist.files import open_regular

HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
MOST_TOKENS = 2**31 - 1  # of a shard with a header, which counts in int32

# Magic and version in the header, by the type of the ids. uint16 is the format of
# modded-nanogpt, llm.c (GPT-2) and parameter-golf, uint32 that of llm.c (Llama 3).
NARROW: np.dtype[Any] = np.dtype("<u2")
WIDE: np.dtype[Any] = np.dtype("<u4")
_HEADERS: dict[int, tuple[int, np.dtype[Any]]] = {20240520: (1, NARROW), 20240801: (7, WIDE)}
_MAGICS = {dtype: (magic, version) for magic, (version, dtype) in _HEADERS.items()}

# Megatron's index: magic, version, type of the ids, number of sequences, number of documents.
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    4: WIDE,
    8: NARROW,
}  # int32 ids are not negative


@dataclass(frozen=True)
class TokenLayout:
    """Location of the tokens: ``count`` ids of type ``dtype`` from byte ``offset``."""

    dtype: np.dtype[Any]
    offset: int
    count: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of a vocabulary's ids: uint16 if they fit, else uint32 (little-endian)."""
    return NARROW if vocab_size <= 2**16 else WIDE


def header(dtype: np.dtype[Any], count: int) -> bytes:
    """Return the header of a shard of ``count`` tokens of ``dtype`` (``NARROW`` or ``WIDE``)."""
    words = np.zeros(HEADER_WORDS, dtype="<i4")
    words[:3] = *_MAGICS[dtype], count
    return words.tobytes()


def read_layout(file: IO[bytes], path: Path) -> TokenLayout:
    """Recognize the format of an open file.

    Raises:
        UserError: not a token shard, or a damaged one.
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    start = os.pread(file.fileno(), HEADER_BYTES, 0)
    index = path.with_suffix(".idx")
    if index != path and not _has_header(start) and os.path.lexists(index):
        return _read_index(index, path, size)
    problem = _header_problem(start, size)
    if problem:
        raise UserError(f"{path}: {problem}")
    magic, _, count = _words(start)
    return TokenLayout(_HEADERS[magic][1], HEADER_BYTES, count)


def _words(start: bytes) -> tuple[int, int, int]:
    magic, version, count = struct.unpack_from("<3i", start)
    return magic, version, count


def _has_header(start: bytes) -> bool:
    return len(start) == HEADER_BYTES and _words(start)[0] in _HEADERS


# Files mistaken for shards, by their first bytes.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch it with: git lfs pull",
    b"\x93NUMPY": "a NumPy file; write it again with jepa_dist.data.shards.write_shard",
    b"\x1f\x8b": "a gzip file; unpack it with: gunzip",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it with: unzstd",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"PAR1": "a parquet file; prepare it: python -m jepa_dist.data.prepare FILE --out DIR",
    b"MMIDIDX": "an index of Megatron; name only the .bin files, each is read with its .idx",
    b"TNTIDX": "an index of Megatron's old format; convert the data with its current tools",
}


def _header_problem(start: bytes, size: int) -> str | None:
    """Return why a file of ``size`` bytes that begins with ``start`` is not a shard, and a fix."""
    other = next((text for magic, text in _OTHER_FILES.items() if start.startswith(magic)), None)
    if other:
        return f"not a token shard, but {other}"
    fix = (
        "prepare the data again (python -m jepa_dist.data.prepare) or replace this file with an "
        "intact copy"
    )
    if min(size, len(start)) < HEADER_BYTES:
        return f"{size} bytes are too few for a token shard, whose header has {HEADER_BYTES}; {fix}"
    magic, version, count = _words(start)
    if magic not in _HEADERS:
        expected = " or ".join(map(str, _HEADERS))
        return (
            f"not a token shard: expected magic {expected}, found {magic}; if these are bare "
            "uint16 ids without a header (nanoGPT's train.bin), add one with "
            "jepa_dist.data.shards.write_shard (docs/data.md); if they are Megatron's, add its "
            f".idx file to the folder; otherwise {fix}"
        )
    expected_version, dtype = _HEADERS[magic]
    if version != expected_version:
        return f"token shard of version {version}, expected {expected_version}; {fix}"
    found = (size - HEADER_BYTES) // dtype.itemsize
    if found > MOST_TOKENS and (found - count) % 2**32 == 0:
        return (
            f"holds {found} tokens, more than the int32 of a header can count; write it as "
            f"several shards of at most {MOST_TOKENS}"
        )
    expected_size = HEADER_BYTES + dtype.itemsize * count
    if count < 0 or size != expected_size:
        return (
            f"the header promises {count} tokens ({expected_size} bytes), the file has {size} "
            f"bytes; {fix}"
        )
    return None


def _read_index(index: Path, path: Path, size: int) -> TokenLayout:
    """Return the layout of Megatron's ``path`` (of ``size`` bytes) from its .idx file.

    Its sequences must be contiguous, as Megatron's tools write them. Only the ends of the index are
    read, however many sequences there are.

    Raises:
        UserError: a damaged index, or one of another file.
        OSError: it cannot be read.
    """
    label = f"{path}: its index {index.name}"
    with open_regular(index) as file:
        start = file.read(_INDEX_HEADER.size)
        if len(start) < _INDEX_HEADER.size or not start.startswith(_INDEX_MAGIC):
            raise UserError(f"{label} is not Megatron's; expected a file that begins with MMIDIDX")
        _, version, code, sequences, documents = _INDEX_HEADER.unpack(start)
        expected = _INDEX_HEADER.size + 12 * sequences + 8 * documents
        found = os.fstat(file.fileno()).st_size
        if version != 1 or code not in _INDEX_TYPES:
            raise UserError(
                f"{label} has version {version} and type {code}; expected version 1 and ids of "
                f"type {', '.join(map(str, _INDEX_TYPES))} (uint8, int32, uint16)"
            )
        if found != expected:
            raise UserError(
                f"{label} has {found} bytes, expected {expected} for {sequences} sequences; "
                "restore it from an intact copy"
            )
        dtype = _INDEX_TYPES[code]
        end = 0
        if sequences:
            lengths = _INDEX_HEADER.size
            pointers = lengths + 4 * sequences
            (first,) = struct.unpack("<q", os.pread(file.fileno(), 8, pointers))
            last = os.pread(file.fileno(), 8, pointers + 8 * (sequences - 1))
            length = os.pread(file.fileno(), 4, lengths + 4 * (sequences - 1))
            end = struct.unpack("<q", last)[0] + dtype.itemsize * struct.unpack("<i", length)[0]
            end -= first
    if end != size:
        raise UserError(
            f"{label} describes {end} bytes of tokens, the file has {size}; restore both from an "
            "intact copy"
        )
    return TokenLayout(dtype, 0, size // dtype.itemsize)
