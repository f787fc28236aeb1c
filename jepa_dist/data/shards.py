"""Token shards in the field's .bin formats.

A shard is 256 little-endian int32 words (magic, version, number of tokens, zeros) followed by
that many little-endian token ids, uint16 or uint32 (``shard_format``). Shards made for
modded-nanogpt, llm.c or parameter-golf, and Megatron's .bin with its .idx, are read as they are.
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
from typing import Any

import numpy as np
import numpy.typing as npt

from jepa_dist.data.journal import flush, reopen
from jepa_dist.data.remote_shards import fetch_shards
from jepa_dist.data.shard_format import (
    HEADER_BYTES,
    MOST_TOKENS,
    header,
    read_layout,
    token_dtype,
)
from jepa_dist.errors import UserError
from jepa_dist.files import make_new, open_regular
from jepa_dist.remote import is_url

Tokens = npt.NDArray[np.unsignedinteger[Any]]

_SAMPLED_BLOCKS = 8
_SAMPLED_BYTES = 4096
_COMPARED_TOKENS = 1 << 20
_MOST_MATCHES = 100_000


class ShardWriter:
    """Writer of one shard, piece by piece; the file gets its name when it is complete.

    A context manager: leaving it normally publishes the shard, an exception removes the
    temporary file.

    Args:
        path: The shard.
        vocab_size: Number of legal ids; they are written as uint16 up to 65,536, else as uint32.
        resume: Continue an existing temporary file, or shard, after this many tokens.
        keep: After an exception, keep the temporary file for ``resume``.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full.
        OSError: there is nothing to continue.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int = 2**16,
        resume: int | None = None,
        keep: bool = False,
    ) -> None:
        self.path = path
        self._keep = keep
        self.count = resume or 0
        self._dtype = token_dtype(vocab_size)
        self._partial = path.with_name(f".{path.name}.partial")
        if resume is not None:
            if not self._partial.exists():
                path.rename(self._partial)
            self._file = reopen(self._partial, HEADER_BYTES + resume * self._dtype.itemsize)
            return
        with self._naming_the_file():
            self._file = make_new(self._partial)
            self._file.write(bytes(HEADER_BYTES))

    def flush(self) -> None:
        """Flush the file to disk.

        Raises:
            UserError: the file cannot be written.
        """
        with self._naming_the_file():
            flush(self._file)

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append token ids, integers of any type.

        Raises:
            UserError: an id that the shard's type cannot hold, more than ``MOST_TOKENS`` in all,
                or the file cannot be written.
        """
        data = self._cast(tokens).tobytes()
        with self._naming_the_file():
            self._file.write(data)
        self.count += len(tokens)

    def _cast(self, tokens: npt.NDArray[Any]) -> Tokens:
        most = np.iinfo(self._dtype).max
        if len(tokens) > MOST_TOKENS - self.count:
            raise UserError(
                f"{self.path}: {self.count + len(tokens)} tokens are more than the int32 of a "
                f"header can count; write several shards of at most {MOST_TOKENS}"
            )
        fits = np.can_cast(tokens.dtype, self._dtype) or not len(tokens)
        if not fits and not 0 <= tokens.min() <= tokens.max() <= most:
            raise UserError(
                f"{self.path}: token ids {tokens.min()}..{tokens.max()} do not fit into "
                f"{self._dtype.name} (0..{most}); give the size of their vocabulary (vocab_size)"
            )
        return tokens.astype(self._dtype, copy=False)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._naming_the_file():
                    self._publish()
        finally:
            with contextlib.suppress(OSError):  # fails on a full disk if data are buffered
                self._file.close()
            if not self._keep:
                self._partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        self._file.seek(0)
        self._file.write(header(self._dtype, self.count))
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


def write_shard(path: Path, tokens: npt.NDArray[Any], vocab_size: int = 2**16) -> None:
    """Write ``tokens`` (integers, any type) as one shard, atomically.

    Raises:
        UserError: as ``ShardWriter`` and its ``write``.
    """
    with ShardWriter(path, vocab_size) as writer:
        writer.write(tokens)


class Shard:
    """Reader of an open shard.

    Uses ``pread``, not a mapping: a truncated file or failing storage then raises an error with
    the file's name, instead of a bus error that ends the process.

    Args:
        path: The shard.

    Raises:
        UserError: unreadable file, wrong magic or version, or a length unlike the header's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
            self._layout = read_layout(self._file, path)
        except (OSError, ValueError) as error:  # the latter: a NUL in the name
            raise _unreadable(path, error) from None
        self.count = self._layout.count
        self.dtype = self._layout.dtype

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens start..stop-1 in the shard's type (uint16, uint32 or uint8).

        ``stop`` is at most ``count``; the result has the shape [stop - start].

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        width = self._layout.dtype.itemsize
        wanted = width * (stop - start)
        offset = self._layout.offset + width * start
        data = b""
        while len(data) < wanted:
            try:
                part = os.pread(self._file.fileno(), wanted - len(data), offset + len(data))
            except OSError as error:
                raise _unreadable(self.path, error) from None
            if not part:
                raise UserError(
                    f"{self.path}: truncated while in use: token {start + len(data) // width} of "
                    f"{self.count} is missing; restore the file, and replace shards by renaming a "
                    "new file over the old one"
                )
            data = data + part if data else part
        return np.frombuffer(data, dtype=self._layout.dtype)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def read_count(path: Path) -> int:
    """Return the number of tokens in a shard, from its validated header.

    Raises:
        UserError: as ``Shard``.
    """
    return Shard(path).count


def read_shard(path: Path) -> Tokens:
    """Return all tokens of a shard, [count], in the shard's type.

    Raises:
        UserError: as ``Shard``.
    """
    shard = Shard(path)
    return shard.read(0, shard.count)


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot read the token shard: {reason}")


def num_windows(count: int, seq_len: int) -> int:
    """Return the number of windows of seq_len+1 tokens, stride seq_len, in ``count`` tokens."""
    return max(0, count - 1) // seq_len


def check_ids(path: Path, ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Raise for token ids outside the vocabulary.

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
    """Return the files that match a glob pattern, sorted by name.

    An existing path, or existing folders at the start of a pattern, are used literally, even with
    brackets in their names.

    Args:
        pattern: Glob, ``~`` and ``**`` included, or a URL with wildcards (``remote_shards``).
        key: Configuration key it came from, for the error message.

    Raises:
        UserError: no file matches, a match cannot be read as a file, or there are far too many.
    """
    if is_url(pattern):
        return list(fetch_shards(pattern, key))
    label = f"{key}={pattern!r}"
    try:
        os.stat(pattern)
    except ValueError as error:  # a NUL, or characters that file names cannot have
        raise UserError(f"{label}: not a file name: {error}") from None
    except OSError:
        pass  # most patterns are not files
    names = _matches(os.path.expanduser(pattern), label)
    kinds = {name: _kind(name) for name in names}
    if _is_recursive(pattern):
        kinds = {name: kind for name, kind in kinds.items() if kind != "a folder"}
    refused = [f"{name} ({kind})" for name, kind in kinds.items() if kind]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"{label}: matches files that are not shards: {', '.join(refused[:3])}{more}; remove "
            "them, or match only the shards, e.g. FOLDER/train_*.bin"
        )
    if not kinds:
        raise UserError(
            f"{label}: no token shard matches (looked from {os.getcwd()}); "
            "python -m jepa_dist.data.prepare makes the default corpus"
        )
    return [Path(name) for name in kinds]


def _matches(pattern: str, label: str) -> list[str]:
    """Return the matching names, sorted as paths.

    Raises:
        UserError: too many matches, or the whole file system would be searched.
    """
    parts = Path(pattern).parts
    known = next((n for n in range(len(parts), 0, -1) if os.path.lexists(Path(*parts[:n]))), 0)
    if known == 1 and "**" in parts and parts[0] == os.sep:
        raise UserError(f"{label}: would search the whole file system; name the shards' folder")
    # A path that exists literally is not a pattern, whatever its name contains.
    existing = glob.escape(str(Path(*parts[:known]))) if known else ""
    found = glob.iglob(os.path.join(existing, *parts[known:]), recursive=True)
    names = set(itertools.islice(found, _MOST_MATCHES + 1))
    if len(names) > _MOST_MATCHES:
        raise UserError(f"{label}: matches more than {_MOST_MATCHES} files; match only the shards")
    return sorted(names, key=Path)


def _is_recursive(pattern: str) -> bool:
    """Return whether a pattern always matches folders, too."""
    return Path(pattern).name == "**"


def _kind(name: str) -> str | None:
    """Describe a path that is not a regular file; None if it is one."""
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
    """Return whether two shards have the same tokens; most others differ in the first block.

    Raises:
        UserError: one of them is damaged.
    """
    one, other = Shard(first), Shard(second)
    if one.count != other.count:
        return False
    spans = itertools.pairwise([*range(0, one.count, _COMPARED_TOKENS), one.count])
    return all(np.array_equal(one.read(a, b), other.read(a, b)) for a, b in spans)


def fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what identifies a data set, as JSON data.

    ``files`` has each shard's name (without folders), bytes, tokens and a digest over its
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
        digest.update(file.read(HEADER_BYTES))
        last = max(HEADER_BYTES, size - _SAMPLED_BYTES)
        for block in range(_SAMPLED_BLOCKS):
            file.seek(HEADER_BYTES + (last - HEADER_BYTES) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_SAMPLED_BYTES))
    return {"name": path.name, "bytes": size, "tokens": count, "digest": digest.hexdigest()}
