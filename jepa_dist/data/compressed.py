"""Stream reader of compressed JSON lines: gzip and zstd, with any number of members or frames."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError
from jepa_dist.files import open_regular

# A compressed byte may expand to a thousand, so little is read at a time.
_READ_BYTES = 1 << 12
_MOST_OUT = 1 << 20
_MOST_WINDOW = 1 << 27


@dataclass(frozen=True)
class Lines:
    """Complete lines of a file."""

    data: bytes
    offset: int
    """Offset of the first one in the uncompressed text."""
    line: int
    """Number of the first one, from 1."""
    consumed: int
    """Compressed bytes read since the previous lines."""


def read_lines(path: Path, block_bytes: int, line_bytes: int) -> Iterator[Lines]:
    """Yield the lines of a ``.gz`` or ``.zst`` file, in blocks of about ``block_bytes``.

    Memory is bounded by a block and a line, whatever the file contains.

    Raises:
        UserError: a damaged or truncated file, with the offset; a line of more than
            ``line_bytes``; the zstandard package is missing.
    """
    held, end = bytearray(), 0  # end: end of the last complete line
    offset, line, reported, consumed = 0, 1, 0, 0
    for data, consumed in _decompressed(path):
        if b"\n" in data:
            end = len(held) + data.rfind(b"\n") + 1
        held += data
        if len(held) - end > line_bytes:
            number = line + held.count(b"\n")
            raise UserError(
                f"{path}:{number}: a line of more than {line_bytes >> 20} MiB; each line is one "
                "document: split it"
            )
        if end and len(held) >= block_bytes:
            block = bytes(held[:end])
            yield Lines(block, offset, line, consumed - reported)
            line, offset, reported = line + block.count(b"\n"), offset + end, consumed
            del held[:end]
            end = 0
    if held:
        yield Lines(bytes(held), offset, line, consumed - reported)


def _decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield pieces of the uncompressed text, each with the compressed bytes read so far."""
    kind = path.suffix.lower()
    start = _zstd(path) if kind == ".zst" else lambda: _Gzip()
    with open_regular(path) as file:
        frame: Any = start()
        begun, at = False, 0
        while data := file.read(_READ_BYTES):
            at += len(data)
            while data:
                try:
                    out, data = frame.take(data)
                except Exception as error:  # zlib.error, ZstdError
                    raise UserError(
                        f"{path}: damaged {kind[1:]} data at or before byte {at}: {error}; restore "
                        "the file from an intact copy"
                    ) from None
                begun = True
                if out:
                    yield out, at
                if frame.ended:
                    frame, begun = start(), False
                    data = data.lstrip(b"\0") if kind == ".gz" else data  # padding by tar
        if begun:
            raise UserError(
                f"{path}: ends at byte {at} in the middle of its {kind[1:]} data; restore the file "
                "from an intact copy"
            )


class _Gzip:
    """A member of a gzip file."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """Return some output, and the rest of the input."""
        out = self._object.decompress(data, _MOST_OUT)
        return out, self._object.unused_data or self._object.unconsumed_tail

    @property
    def ended(self) -> bool:
        return self._object.eof


class _Zstd:
    """A frame of a zstd file."""

    def __init__(self, context: Any) -> None:
        self._object = context.decompressobj()

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """Return all output, and the input after the frame."""
        out = self._object.decompress(data)
        return out, self._object.unused_data if self._object.eof else b""

    @property
    def ended(self) -> bool:
        return bool(self._object.eof)


def _zstd(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path}: needs the zstandard package; pip install 'jepa_dist[data]'"
        ) from None
    context = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW)
    return lambda: _Zstd(context)
