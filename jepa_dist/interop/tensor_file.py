"""Read a safetensors file piece by piece.

The library maps a file, so a truncated file or failing storage ends the process with a bus error
that names no file. Here bytes are read with ``preadv`` directly into the tensor, and the header is
compared with the size of the file before anything is allocated.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.files import MIB, open_regular
from jepa_dist.interop.verify import Signature

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Name that safetensors gives to each dtype that a run saves."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_LENGTH_BYTES = 8
# About 200,000 tensors; the library allows 100 MB.
_MOST_HEADER_BYTES = 32 * MIB
# Linux reads at most 2 GiB per call; smaller pieces allow interrupts in between.
_PIECE_BYTES = 256 * MIB

_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """A tensor in the header."""

    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=16)]
    data_offsets: tuple[_Size, _Size]


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])


class TensorFile:
    """An open safetensors file; a context manager.

    Args:
        path: The file. Links are followed.

    Raises:
        UserError: it cannot be read, or is not a complete safetensors file of known dtypes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        try:
            self._start, self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def signatures(self) -> dict[str, Signature]:
        """Return shape and dtype of every tensor, by name, in the order of the header."""
        return {name: Signature(e.shape, e.dtype) for name, e in self._entries.items()}

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor or a block of it, on the CPU.

        Args:
            name: The tensor; it must be in ``signatures()``.
            box: A slice with start and stop for every dimension; None for the whole tensor.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        entry = self._entries[name]
        dtype = _TORCH_DTYPES[entry.dtype]
        if not entry.shape:
            return self._read(name, entry, 0, 1, dtype).reshape(())
        rows = box[0] if box else slice(0, entry.shape[0])
        row = math.prod(entry.shape[1:])
        whole_rows = self._read(name, entry, rows.start * row, rows.stop * row, dtype)
        shaped = whole_rows.reshape(rows.stop - rows.start, *entry.shape[1:])
        return shaped[(slice(None), *box[1:])] if box else shaped

    def _read(self, name: str, entry: _Entry, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return elements start..stop-1 of a tensor's flat data."""
        tensor = torch.empty(stop - start, dtype=dtype)
        if tensor.numel() == 0:
            return tensor
        data = tensor.view(torch.uint8).numpy().data
        position = self._start + entry.data_offsets[0] + start * dtype.itemsize
        done = 0
        while done < len(data):
            try:
                piece = data[done : done + _PIECE_BYTES]
                count = os.preadv(self._file.fileno(), [piece], position + done)
            except OSError as error:
                raise self._damaged(f"{name:.80}: {error.strerror}") from None
            if count == 0:
                raise self._damaged(f"{name:.80}: the file was truncated while in use")
            done += count
        return tensor

    def _read_header(self) -> tuple[int, Mapping[str, _Entry]]:
        """Return the offset of the data, and the tensors in the header."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._bytes_at(0, _LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if start > size:
            raise self._damaged(f"a header of {length} bytes does not fit into {size}")
        if length > _MOST_HEADER_BYTES:
            raise self._damaged(f"a header of {length} bytes, more than {_MOST_HEADER_BYTES}")
        try:
            found = _HEADER.validate_json(self._bytes_at(_LENGTH_BYTES, length))
        except ValidationError as error:
            raise self._damaged(f"header: {invalid_fields(error)[0]}") from None
        entries = {n: e for n, e in found.items() if n != "__metadata__" and isinstance(e, _Entry)}
        if len(entries) + ("__metadata__" in found) != len(found):
            raise self._damaged("header: a tensor without dtype, shape and data_offsets")
        self._check(entries, size - start)
        return start, entries

    def _check(self, entries: Mapping[str, _Entry], size: int) -> None:
        """Raise unless the tensors fill ``size`` bytes without gap or overlap."""
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            if entry.dtype not in _TORCH_DTYPES:
                known = ", ".join(_TORCH_DTYPES)
                raise self._damaged(f"{name:.80}: dtype {entry.dtype!r:.20}, expected {known}")
            wanted = math.prod(entry.shape) * _TORCH_DTYPES[entry.dtype].itemsize
            first, last = entry.data_offsets
            if first != end or last - first != wanted:
                raise self._damaged(
                    f"{name:.80}: lies at bytes {first} to {last}, but its shape takes {wanted} "
                    f"bytes from {end}"
                )
            end = last
        if end != size:
            raise self._damaged(f"the header lists {end} bytes of tensors, the file holds {size}")

    def _bytes_at(self, position: int, count: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), count, position)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        if len(data) < count:
            raise self._damaged(f"ends after {position + len(data)} bytes, within its header")
        return data

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self.path}: damaged: not a whole safetensors file ({reason}); copy or export it "
            "again"
        )


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is looked up.

    Args:
        names: In their order.
        read: Returns the tensor of a name.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def lazy_tensors(path: Path) -> LazyTensors:
    """Return the tensors of a file, on the CPU.

    Raises:
        UserError: it is damaged; also when a tensor is looked up.
    """

    def read(name: str) -> Tensor:
        with TensorFile(path) as file:
            return file.read(name)

    with TensorFile(path) as file:
        return LazyTensors(file.signatures(), read)
