"""Documents in random order, on disk: memory does not grow with the text.

Every document gets a key, a pseudo-random function of the seed and its number. The range of keys is
divided into buckets, files to which documents are appended. Finally, each bucket's documents are
read back in the order of their keys: the result does not depend on the number of buckets.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from jepa_dist.data.journal import ShuffleState, flush, reopen
from jepa_dist.data.order import Key, scatter
from jepa_dist.data.shards import Tokens
from jepa_dist.errors import UserError
from jepa_dist.files import make_new

MOST_BUCKETS = 128
_BUCKET_BYTES = 1 << 26
# Number of tokens to read back at once.
_PIECE_TOKENS = 1 << 20


def _round_keys(seed: int) -> Key:
    return np.frombuffer(hashlib.blake2b(f"shuffle {seed}".encode()).digest(), dtype="<u8")


def num_buckets(text_bytes: int) -> int:
    """Return a number of buckets that is fast to read back for this much text."""
    return min(MOST_BUCKETS, 1 + text_bytes // _BUCKET_BYTES)


class ShuffledDocuments:
    """A stream of documents that is read back in random order.

    A context manager: leaving it normally removes its files; after an exception they are kept for
    resuming. Memory: 16 bytes for each document of one bucket while it is read back.

    Args:
        folder: Folder of its files; created.
        bos_id: Id that begins every document, and occurs nowhere else.
        seed: Seed of the order.
        buckets: Number of files.
        dtype: Dtype of the tokens.
        resume: Continue existing files from this state.

    Raises:
        OSError: there is nothing to continue.
    """

    def __init__(
        self,
        folder: Path,
        bos_id: int,
        seed: int,
        buckets: int,
        dtype: np.dtype[Any],
        resume: ShuffleState | None = None,
    ) -> None:
        self._folder, self._bos_id, self._key = folder, bos_id, _round_keys(seed)
        self._dtype = dtype
        self._documents = 0 if resume is None else resume.documents
        self._current = np.array([0 if resume is None else resume.current], dtype=np.uint64)
        """Key of the latest document, which may continue."""
        with contextlib.ExitStack() as stack:
            if resume is None:
                with self._naming_the_folder():
                    folder.mkdir()
                    opened = [_Bucket(folder, number) for number in range(buckets)]
                    self._buckets = [stack.enter_context(bucket) for bucket in opened]
            else:
                sizes = enumerate(resume.bytes)
                self._buckets = [stack.enter_context(_Bucket(folder, n, s)) for n, s in sizes]
            self._open = stack.pop_all()

    def state(self) -> ShuffleState:
        """Flush the files; return their state.

        Raises:
            UserError: the disk is full.
        """
        with self._naming_the_folder():
            sizes = [bucket.flushed() for bucket in self._buckets]
        (current,) = self._current.tolist()
        return ShuffleState(documents=self._documents, current=current, bytes=sizes)

    def write(self, tokens: Tokens) -> None:
        """Append tokens: whole documents, or the continuation of the last one.

        Raises:
            UserError: the disk is full.
        """
        tokens = tokens.astype(self._dtype, copy=False)
        (starts,) = np.nonzero(tokens == self._bos_id)
        numbers = np.arange(self._documents, self._documents + len(starts), dtype=np.uint64)
        keys = np.concatenate([self._current, scatter(numbers, self._key)])
        self._documents += len(starts)
        self._current = keys[-1:]
        ends = [0, *starts.tolist(), len(tokens)]
        with self._naming_the_folder():
            for key, start, end in zip(keys.tolist(), ends[:-1], ends[1:], strict=True):
                if end > start:
                    self._buckets[key * len(self._buckets) >> 64].add(key, tokens[start:end])

    def read(self) -> Iterator[Tokens]:
        """Yield the tokens of all documents in their new order, in pieces of at most some MiB.

        Raises:
            UserError: the disk is full, or a file cannot be read.
        """
        for bucket in self._buckets:
            with self._naming_the_folder():
                yield from bucket.read(self._dtype)

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot shuffle documents: {error.strerror}; free disk space (as "
                "much as the shards take, in addition to them)"
            ) from None

    def __enter__(self) -> ShuffledDocuments:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._open.__exit__(kind, *error)
        if kind is None:
            self._folder.rmdir()


class _Bucket:
    """Documents of a range of keys: a file of tokens, and one of their keys and lengths.

    Args:
        folder: Folder of the files.
        number: Number of the bucket.
        sizes: Continue existing files, truncated to these sizes.
    """

    def __init__(self, folder: Path, number: int, sizes: tuple[int, int] | None = None) -> None:
        self._paths = [folder / f"{number:03d}.{name}" for name in ("tokens", "index")]
        self._sizes = sizes

    def __enter__(self) -> _Bucket:
        if self._sizes is None:
            self._tokens, self._index = (make_new(path) for path in self._paths)
        else:
            self._tokens, self._index = map(reopen, self._paths, self._sizes)
        return self

    def flushed(self) -> tuple[int, int]:
        """Flush both files to disk; return their sizes."""
        for file in (self._tokens, self._index):
            flush(file)
        return self._tokens.tell(), self._index.tell()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file, path in zip((self._tokens, self._index), self._paths, strict=True):
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                file.close()
            if kind is None:
                path.unlink(missing_ok=True)

    def add(self, key: int, tokens: Tokens) -> None:
        """Append a document, or the next part of the last one."""
        self._tokens.write(tokens.tobytes())
        self._index.write(key.to_bytes(8, "little") + len(tokens).to_bytes(8, "little"))

    def read(self, dtype: np.dtype[Any]) -> Iterator[Tokens]:
        """Yield the tokens in the order of the keys."""
        self._tokens.flush()
        self._index.flush()
        with self._paths[1].open("rb") as file:
            index = np.frombuffer(file.read(), dtype="<u8").reshape(-1, 2)
        counts = index[:, 1].astype(np.int64)
        offsets = np.cumsum(counts) - counts
        with self._paths[0].open("rb") as file:
            # Stable: the parts of a document have the same key and keep their order.
            for place in np.argsort(index[:, 0], kind="stable").tolist():
                yield from _read(file, int(offsets[place]), int(counts[place]), dtype)


def _read(file: BinaryIO, start: int, count: int, dtype: np.dtype[Any]) -> Iterator[Tokens]:
    file.seek(start * dtype.itemsize)
    while count:
        data = file.read(min(count, _PIECE_TOKENS) * dtype.itemsize)
        piece: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype)
        yield piece
        count -= len(piece)
