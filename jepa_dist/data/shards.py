"""Token shards in the field's .bin format.

A shard is 256 little-endian int32 words (magic, version, number of tokens, zeros) followed by
that many little-endian uint16 token ids. Shards made for modded-nanogpt, llm.c or parameter-golf
are read as they are.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jepa_dist.errors import UserError
from jepa_dist.files import make_new, open_regular

HEADER_WORDS = 256
MAGIC = 20240520
VERSION = 1
LLAMA3_MAGIC = 20240801
MOST_TOKENS = 2**31 - 1  # of a shard: its header counts in int32

Tokens = npt.NDArray[np.uint16]

_HEADER_BYTES = HEADER_WORDS * 4
_TOKEN_BYTES = 2
_SAMPLED_BLOCKS = 8
_SAMPLED_BYTES = 4096
_COMPARED_TOKENS = 1 << 20
_MOST_MATCHES = 100_000


class ShardWriter:
    """Writes one shard piece by piece; the file appears under its name only when it is whole.

    A context manager: leaving it normally publishes the shard, an exception removes the
    temporary file beside it.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._partial = path.with_name(f".{path.name}.partial")
        with self._naming_the_file():
            self._file = make_new(self._partial)
            self._file.write(bytes(_HEADER_BYTES))

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append token ids (integers in 0..65535); at most ``MOST_TOKENS`` in all."""
        data = tokens.astype("<u2", copy=False).tobytes()
        with self._naming_the_file():
            self._file.write(data)
        self.count += len(tokens)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._naming_the_file():
                    self._publish()
        finally:
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.count
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.rename(self.path)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; free the disk or name another "
                "folder"
            ) from None


def write_shard(path: Path, tokens: npt.NDArray[Any]) -> None:
    """Write ``tokens`` (integers in 0..65535) as one shard, atomically."""
    with ShardWriter(path) as writer:
        writer.write(tokens)


class Shard:
    """An open shard, read piece by piece.

    It is read with ``pread``, not mapped: a file that shrinks, or storage that fails, is then an
    error with the file's name instead of a bus error that ends the process.

    Args:
        path: The shard.

    Raises:
        UserError: unreadable file, wrong magic or version, or a length unlike the header's count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
            self.count = _count_in_header(self._file, path)
        except (OSError, ValueError) as error:  # the latter: a NUL in the name
            raise _unreadable(path, error) from None

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1 of the shard, uint16 [stop - start]; ``stop`` is at most ``count``.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        wanted = _TOKEN_BYTES * (stop - start)
        offset = _HEADER_BYTES + _TOKEN_BYTES * start
        data = b""
        while len(data) < wanted:
            try:
                part = os.pread(self._file.fileno(), wanted - len(data), offset + len(data))
            except OSError as error:
                raise _unreadable(self.path, error) from None
            if not part:
                raise UserError(
                    f"{self.path}: truncated while in use: token {start + len(data) // 2} of "
                    f"{self.count} is gone; restore the file, and replace shards by renaming a "
                    "new file over the old one"
                )
            data = data + part if data else part
        return np.frombuffer(data, dtype="<u2")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def read_count(path: Path) -> int:
    """Number of tokens in a shard, from its validated header.

    Raises:
        UserError: as ``Shard``.
    """
    return Shard(path).count


def read_shard(path: Path) -> Tokens:
    """All tokens of a shard, uint16 [count], in memory.

    Raises:
        UserError: as ``Shard``.
    """
    shard = Shard(path)
    return shard.read(0, shard.count)


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot read the token shard: {reason}")


def _count_in_header(file: IO[bytes], path: Path) -> int:
    size = os.fstat(file.fileno()).st_size
    start = os.pread(file.fileno(), _HEADER_BYTES, 0)
    problem = _header_problem(start, size)
    if problem:
        raise UserError(f"{path}: {problem}")
    return int.from_bytes(start[8:12], "little")


# What people name as shards that are none, by how the files begin.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch it with: git lfs pull",
    b"\x93NUMPY": "a NumPy file; write it again with jepa_dist.data.shards.write_shard",
    b"\x1f\x8b": "a gzip file; unpack it with: gunzip",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it with: unzstd",
    b"PK\x03\x04": "a zip file; unpack it first",
}


def _header_problem(start: bytes, size: int) -> str | None:
    """Why a file of ``size`` bytes that begins with ``start`` is no shard, and the way out."""
    other = next((text for magic, text in _OTHER_FILES.items() if start.startswith(magic)), None)
    if other:
        return f"not a token shard, but {other}"
    way_out = (
        "prepare the data again (python -m jepa_dist.data.prepare) or replace this file with an "
        "intact copy"
    )
    if min(size, len(start)) < _HEADER_BYTES:
        return (
            f"{size} bytes are too few for a token shard, whose header has {_HEADER_BYTES}; "
            f"{way_out}"
        )
    magic, version, count = (int(word) for word in np.frombuffer(start, "<i4", count=3))
    if magic == LLAMA3_MAGIC:
        return (
            f"a shard of llm.c for Llama 3 (magic {magic}): its ids are uint32, but this program "
            "reads uint16 ids; use a tokenizer of at most 65,536 ids"
        )
    if magic != MAGIC:
        return (
            f"not a token shard: expected magic {MAGIC}, found {magic}; if these are bare uint16 "
            "ids without a header (nanoGPT's train.bin), add one with "
            f"jepa_dist.data.shards.write_shard; otherwise {way_out}"
        )
    if version != VERSION:
        return f"token shard of version {version}, expected {VERSION}; {way_out}"
    found = (size - _HEADER_BYTES) // _TOKEN_BYTES
    if found > MOST_TOKENS and (found - count) % 2**32 == 0:
        return (
            f"holds {found} tokens, more than the int32 of a header can count; write it as "
            f"several shards of at most {MOST_TOKENS}"
        )
    expected = _HEADER_BYTES + _TOKEN_BYTES * count
    if count < 0 or size != expected:
        return (
            f"the header promises {count} tokens ({expected} bytes), the file has {size} bytes; "
            f"{way_out}"
        )
    return None


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

    A path, or the folders at its beginning, that exists as it is written is taken as it is, also
    with brackets in its name.

    Args:
        pattern: Glob, ``~`` and ``**`` included.
        key: Configuration key it came from, for the error message.

    Raises:
        UserError: no file matches, a match cannot be read as a file, or there are far too many.
    """
    told = f"{key}={pattern!r}"
    if "://" in pattern:
        raise UserError(
            f"{told}: is a URL; token shards are read from files: copy them to a folder that "
            "every node sees"
        )
    try:
        os.stat(pattern)
    except ValueError as error:  # a NUL, or what no file name can hold
        raise UserError(f"{told}: not a file name: {error}") from None
    except OSError:
        pass  # most patterns are no file
    names = _matches(os.path.expanduser(pattern), told)
    kinds = {name: _kind(name) for name in names}
    if _is_recursive(pattern):
        kinds = {name: kind for name, kind in kinds.items() if kind != "a folder"}
    refused = [f"{name} ({kind})" for name, kind in kinds.items() if kind]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"{told}: matches what is no token shard: {', '.join(refused[:3])}{more}; remove it, "
            "or name the shards alone, e.g. FOLDER/train_*.bin"
        )
    if not kinds:
        raise UserError(
            f"{told}: no token shard matches (looked from {os.getcwd()}); "
            "python -m jepa_dist.data.prepare makes the default corpus"
        )
    return [Path(name) for name in kinds]


def _matches(pattern: str, told: str) -> list[str]:
    """Names that match, sorted as paths.

    Raises:
        UserError: they would be searched for in the whole file system, or are too many.
    """
    parts = Path(pattern).parts
    known = next((n for n in range(len(parts), 0, -1) if os.path.lexists(Path(*parts[:n]))), 0)
    if known == 1 and "**" in parts and parts[0] == os.sep:
        raise UserError(f"{told}: would search the whole file system; name the shards' folder")
    # What exists as it is written is no pattern, whatever its name holds.
    existing = glob.escape(str(Path(*parts[:known]))) if known else ""
    found = glob.iglob(os.path.join(existing, *parts[known:]), recursive=True)
    names = set(itertools.islice(found, _MOST_MATCHES + 1))
    if len(names) > _MOST_MATCHES:
        raise UserError(f"{told}: matches more than {_MOST_MATCHES} files; name the shards alone")
    return sorted(names, key=Path)


def _is_recursive(pattern: str) -> bool:
    """Whether folders are among the matches by the nature of the pattern."""
    return Path(pattern).name == "**"


def _kind(name: str) -> str | None:
    """What a path is in words, unless it is a regular file."""
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return "a link to a missing file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "a folder"
    return None if stat.S_ISREG(mode) else "not a regular file"


def same_contents(first: Path, second: Path) -> bool:
    """Whether two shards hold the same tokens; most that do not differ in the first block.

    Raises:
        UserError: one of them is damaged.
    """
    one, other = Shard(first), Shard(second)
    if one.count != other.count:
        return False
    spans = itertools.pairwise([*range(0, one.count, _COMPARED_TOKENS), one.count])
    return all(np.array_equal(one.read(a, b), other.read(a, b)) for a, b in spans)


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
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(_HEADER_BYTES))
        last = max(_HEADER_BYTES, size - _SAMPLED_BYTES)
        for block in range(_SAMPLED_BLOCKS):
            file.seek(_HEADER_BYTES + (last - _HEADER_BYTES) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_SAMPLED_BYTES))
    return {"name": path.name, "bytes": size, "tokens": count, "digest": digest.hexdigest()}
