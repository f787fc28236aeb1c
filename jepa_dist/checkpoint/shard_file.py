"""Checkpoint shard files in the safetensors format, written in one pass and read in slices.

PyTorch has its own safetensors storage (``HuggingFaceStorageWriter``). It builds the whole file in
memory while it holds the GIL (0.9 s for a shard of 256 MB, in which no training step is launched),
and a digest would require reading the file again. Writing the format here needs no copy, computes
the digest meanwhile, and releases the GIL. The offsets are in the header where PyTorch's reader
expects them, so that ``HuggingFaceStorageReader`` can read the files.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from jepa_dist.checkpoint.manifest import (
    DTYPE_BYTES,
    PIECE_BYTES,
    Chunk,
    FileEntry,
    TensorEntry,
    digest_of,
)
from jepa_dist.errors import UserError
from jepa_dist.interop.tensor_file import DTYPES, TensorFile
from jepa_dist.interop.verify import Signature

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
assert _TORCH_DTYPES.keys() == DTYPE_BYTES.keys()


class Part(NamedTuple):
    """One rank's part of one tensor."""

    data: Tensor
    """On the CPU, contiguous."""
    offset: tuple[int, ...]
    """Its position in the full tensor."""


def write_shard(path: Path, parts: Mapping[str, Part]) -> FileEntry:
    """Write a new file and flush it to disk (fsync).

    Raises:
        OSError: it exists already, or cannot be written.
    """
    with open(path, "xb") as file:
        digest = digest_of()
        size = 0
        for piece in _pieces(parts):
            digest.update(piece)
            size += file.write(piece)
        _sync(file)
    return FileEntry(bytes=size, blake2b=digest.hexdigest())


def _pieces(parts: Mapping[str, Part]) -> Iterable[bytes | memoryview]:
    yield _header(parts)
    for part in parts.values():
        flat = part.data.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), PIECE_BYTES):
            yield flat[start : start + PIECE_BYTES]


def _header(parts: Mapping[str, Part]) -> bytes:
    """Return the file header: length and JSON with each tensor's byte range, and the offsets that
    PyTorch's reader needs."""
    offsets = {name: {"saved_offsets": part.offset} for name, part in parts.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
    }
    position = 0
    for name, part in parts.items():
        end = position + part.data.numel() * part.data.element_size()
        header[name] = {
            "dtype": DTYPES[part.data.dtype],
            "shape": list(part.data.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class ShardFiles:
    """The shard files of a checkpoint, each opened at most once; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, tuple[TensorFile, Mapping[str, Signature]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, dtype: str, chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
        """Return a block of a chunk, on the CPU.

        Args:
            name: Name of the tensor.
            dtype: Its dtype, in safetensors notation.
            chunk: One of its chunks.
            box: The block, relative to the chunk.

        Raises:
            UserError: the file does not match the manifest, or has been truncated.
        """
        file, found = self._open(chunk.file)
        if found.get(name) != Signature(chunk.shape, dtype):
            raise UserError(
                f"{file.path}: damaged: {name:.80}: "
                + (
                    f"dtype and shape {found[name].dtype} {found[name].shape}"
                    if name in found
                    else "missing"
                )
                + f", the manifest says {dtype} {chunk.shape}"
            )
        return file.read(name, box)

    def _open(self, name: str) -> tuple[TensorFile, Mapping[str, Signature]]:
        if name not in self._opened:
            file = self._stack.enter_context(TensorFile(self._folder / name))
            self._opened[name] = file, file.signatures()
        return self._opened[name]


def assemble(files: ShardFiles, name: str, entry: TensorEntry) -> Tensor:
    """Return a full tensor assembled from its chunks, on the CPU.

    Raises:
        UserError: a file does not match the manifest.
    """
    full = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
    for chunk in entry.chunks:
        if 0 in chunk.shape:
            continue
        everything = tuple(slice(0, size) for size in chunk.shape)
        box = box_of(chunk.offset, chunk.shape)
        full[box] = files.read(name, entry.dtype, chunk, everything)
    return full


def box_of(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of a block."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name."""
    return _TORCH_DTYPES[name]
