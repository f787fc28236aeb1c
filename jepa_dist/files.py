"""Safe file access in folders that others can write to: regular files of bounded size only.

Opening a FIFO blocks, reading a device never ends, and a file of a terabyte does not fit into
memory. Every function here raises ``OSError`` with a readable ``strerror`` instead, so that callers
handle such a file like one that cannot be read.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from pydantic_core import from_json

MIB = 2**20
# A line of metrics.jsonl has a few kilobytes, or some hundred with a long text sample.
_LINE_BYTES = 4 * MIB


def open_regular(path: Path, limit: int | None = None) -> io.FileIO:
    """Open a regular file for reading; links to one are followed.

    Args:
        path: The file.
        limit: Maximum size in bytes.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is larger.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(descriptor), limit)
        return io.FileIO(descriptor, "r")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, limit: int | None = None) -> None:
    """Raise if ``open_regular`` would, without opening the file.

    Raises:
        OSError: it is missing, not a regular file, or larger.
    """
    _check(path, path.stat(), limit)


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Reads no more than the size that the file system reports; files in /proc report 0 and may be
    endless.

    Raises:
        OSError: as ``open_regular``.
    """
    with open_regular(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        return io.BufferedReader(file).read(size)


def read_json(path: Path, limit: int) -> Any:
    """Return the parsed JSON of a regular file of at most ``limit`` bytes.

    The parser rejects invalid UTF-8, lone surrogates, deep nesting (200 levels) and integers
    of thousands of digits.

    Raises:
        OSError: as ``open_regular``.
        ValueError: not JSON.
    """
    return from_json(read_bytes(path, limit))


def read_lines(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a regular file, holding one at a time in memory.

    Lines appended while reading are ignored. A line of more than 4 MiB is yielded in several parts,
    none of which is valid JSON.

    Args:
        path: The file.
        limit: Maximum size in bytes, for callers that keep all lines.

    Raises:
        OSError: as ``open_regular``.
    """
    with open_regular(path, limit) as file:
        left = os.fstat(file.fileno()).st_size
        lines = io.BufferedReader(file)
        while left > 0 and (line := lines.readline(min(left, _LINE_BYTES))):
            left -= len(line)
            yield line


def open_to_append(path: Path) -> io.FileIO:
    """Open a regular file for appending; create it if it does not exist.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _check(path, os.fstat(descriptor), None)
        return io.FileIO(descriptor, "a")
    except BaseException:
        os.close(descriptor)
        raise


def open_to_append_lines(path: Path) -> io.FileIO:
    """Open as ``open_to_append`` does, and terminate a last line that a crash cut short.

    Raises:
        OSError: as ``open_to_append``.
    """
    file = open_to_append(path)
    size = os.fstat(file.fileno()).st_size
    with open_regular(path) as written:
        written.seek(max(0, size - 1))
        if written.read(1) not in (b"", b"\n"):
            file.write(b"\n")
    return file


def make_new(path: Path) -> IO[bytes]:
    """Open a new file for writing; an existing file or link of that name is unlinked first.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    return open(path, "xb")


def partial_name(path: Path) -> Path:
    """Return an unpredictable temporary name in the folder of ``path``."""
    return path.with_name(f".{path.name[:200]}.{uuid4().hex[:12]}.partial")


def delete(path: Path) -> None:
    """Delete a file or link, or a folder and its contents; links are not followed.

    Raises:
        OSError: part of it cannot be deleted; ``strerror`` says why.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def write_atomically(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a file under a temporary name, then rename it.

    Args:
        path: The file; an existing one is replaced.
        text: Its contents, encoded as UTF-8.
        sync: Flush the contents to disk (fsync) before renaming.

    Raises:
        OSError: it cannot be written.
    """
    partial = partial_name(path)
    try:
        with open(partial, "xb") as file:
            file.write(text.encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _check(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(kind, "not a regular file", str(path))
    if limit is not None and status.st_size > limit:
        problem = f"{status.st_size} bytes, but such a file may have at most {limit}"
        raise OSError(errno.EFBIG, problem, str(path))
