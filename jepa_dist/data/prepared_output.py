"""Writers of a preparation's token shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jepa_dist.data.corpus import SPLITS, Split
from jepa_dist.data.documents import Encoded
from jepa_dist.data.journal import JOURNAL, ShuffleState, State
from jepa_dist.data.shards import ShardWriter, Tokens, read_count
from jepa_dist.data.shuffle import ShuffledDocuments
from jepa_dist.data.staging import clear
from jepa_dist.errors import UserError

_SHUFFLE = "shuffle"

Shuffle = Callable[[Path, ShuffleState | None], ShuffledDocuments]
"""Opens the shuffle of documents in a folder, resuming a state."""


class ShardSet:
    """Writer of one split as train_000000.bin, train_000001.bin, ..., all but the last one full.

    Args:
        folder: Folder of the shards.
        split: ``train`` or ``val``.
        shard_tokens: Maximum number of tokens of a shard.
        vocab_size: Number of legal ids.
        counts: Tokens of the existing shards; the last one is continued.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        shard_tokens: int,
        vocab_size: int,
        counts: Sequence[int] = (),
    ) -> None:
        self._vocab_size = vocab_size
        self._folder, self._split, self._most = folder, split, shard_tokens
        self.counts = {self._path(number).name: count for number, count in enumerate(counts)}
        self._open = contextlib.ExitStack()
        self._writer: ShardWriter | None = None
        if counts:
            path = self._path(len(counts) - 1)
            last = ShardWriter(path, vocab_size, resume=counts[-1], keep=True)
            self._writer = self._open.enter_context(last)

    def write(self, tokens: Tokens) -> None:
        """Append token ids."""
        while len(tokens):
            if self._writer is None or self._writer.count == self._most:
                self._writer = self._next()
            room = self._most - self._writer.count
            self._writer.write(tokens[:room])
            self.counts[self._writer.path.name] = self._writer.count
            tokens = tokens[room:]

    def flushed(self) -> list[int]:
        """Flush the shards to disk; return the tokens of each."""
        if self._writer is not None:
            self._writer.flush()
        return list(self.counts.values())

    def _next(self) -> ShardWriter:
        self._open.close()
        path = self._path(len(self.counts))
        return self._open.enter_context(ShardWriter(path, self._vocab_size, keep=True))

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._split}_{number:06d}.bin"

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


class Output:
    """Writer of both splits; training documents are shuffled if there is a seed.

    A context manager: leaving it normally publishes the shards in their folder; after an exception
    the files are kept for resuming.

    Args:
        folder: Folder of the shards; files that ``state`` does not count are removed.
        state: Progress of an earlier process.
        shard_tokens: Maximum number of tokens of a shard.
        vocab_size: Number of legal ids.
        shuffle: Opens the shuffle of training documents; None: keep their order.

    Raises:
        OSError, UserError: files that ``state`` counts are missing or shorter.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        shard_tokens: int,
        vocab_size: int,
        shuffle: Shuffle | None,
    ) -> None:
        _keep_counted(folder, state)
        with contextlib.ExitStack() as stack:
            self.sets: dict[Split, ShardSet] = {}
            for split in SPLITS:
                counts = state.shards[split]
                shards = ShardSet(folder, split, shard_tokens, vocab_size, counts)
                self.sets[split] = stack.enter_context(shards)
            self._shuffled: ShuffledDocuments | None = None
            if shuffle is not None:
                self._shuffled = stack.enter_context(shuffle(folder / _SHUFFLE, state.shuffled))
            self._open = stack.pop_all()

    def write(self, encoded: Encoded) -> None:
        """Append the documents of a task."""
        for tokens in encoded.tokens["val"]:
            self.sets["val"].write(tokens)
        train = self.sets["train"] if self._shuffled is None else self._shuffled
        for tokens in encoded.tokens["train"]:
            train.write(tokens)

    def flushed(self) -> tuple[dict[Split, list[int]], ShuffleState | None]:
        """Flush everything to disk; return the sizes for the state of the preparation."""
        shards = {split: shards.flushed() for split, shards in self.sets.items()}
        return shards, None if self._shuffled is None else self._shuffled.state()

    def finish(self) -> None:
        """Write the shuffled documents, after the last task."""
        if self._shuffled is not None:
            for tokens in self._shuffled.read():
                self.sets["train"].write(tokens)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def _keep_counted(folder: Path, state: State) -> None:
    """Remove files that a state does not count, and check its finished shards.

    Raises:
        UserError: one of them is missing, or has another number of tokens.
    """
    kept = {JOURNAL} if state.tasks else set()
    if state.shuffled is not None:
        kept.add(_SHUFFLE)
    for split, counts in state.shards.items():
        names = [f"{split}_{number:06d}.bin" for number in range(len(counts))]
        kept |= {*names, *(f".{name}.partial" for name in names[-1:])}
        for name, count in zip(names[:-1], counts, strict=False):
            if read_count(folder / name) != count:
                raise UserError(f"{folder / name}: has other tokens than when it was written")
    clear(folder, kept)
    links = [path for path in folder.iterdir() if path.is_symlink()]
    if links:
        raise UserError(f"{links[0]}: is a link; expected a file of this program")
