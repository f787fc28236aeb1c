"""Sizes of the pages of a parquet file, from their headers; readers hold whole pages in memory.

A header is a struct in Thrift's compact protocol, followed by the compressed page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

# Statistics in a header may contain the smallest and the largest value, of any length.
_HEADER_BYTES = 1 << 16
# Types of the compact protocol.
_NO_DATA, _INTEGERS, _LISTS = (1, 2), (4, 5, 6), (9, 10)
_BYTE, _DOUBLE, _BINARY, _STRUCT = 3, 7, 8, 12
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3


def page_sizes(file: BinaryIO, start: int, stop: int) -> Iterator[int]:
    """Yield the uncompressed bytes of each page of a column chunk.

    Stops at a header that is damaged (reading the pages reports that) or longer than usual.

    Args:
        file: The parquet file; its position changes.
        start: First byte of the chunk.
        stop: The byte after its last.
    """
    while start < stop:
        file.seek(start)
        header = _Header(file.read(min(_HEADER_BYTES, stop - start)))
        try:
            sizes = header.integers()
            compressed = sizes[_COMPRESSED_SIZE]
            yield sizes[_UNCOMPRESSED_SIZE]
        except (IndexError, KeyError, RecursionError):
            return
        if compressed < 0:
            return
        start += header.at + compressed


class _Header:
    """Reader of a struct.

    Raises:
        IndexError: from its methods, if the data ends before the struct or is not a struct.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        """Position of the next byte."""

    def integers(self) -> dict[int, int]:
        """Read a struct; return its integers by field."""
        found, field = {}, 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._integer()
            if kind & 15 in _INTEGERS:
                found[field] = self._integer()
            else:
                self._skip(kind & 15)
        return found

    def _skip(self, kind: int) -> None:
        if kind in _NO_DATA:
            return
        if kind in _INTEGERS:
            self._unsigned()
        elif kind == _STRUCT:
            self.integers()
        elif kind in _LISTS:
            size = self._byte()
            for _ in range(size >> 4 if size >> 4 < 15 else self._unsigned()):
                self._skip(_BYTE if size & 15 in _NO_DATA else size & 15)
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._unsigned()
            self.at += length
            # A list may claim any number of elements; they end here at the latest.
            if self.at > len(self._data):
                raise IndexError
        else:
            raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
