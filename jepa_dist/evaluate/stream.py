"""Token shards read as one sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jepa_dist.data.shards import Shard, check_ids, read_count

# A process has only about 1,000 file descriptors.
_OPEN_SHARDS = 256


class TokenStream:
    """All tokens of several shards, one shard after the other in the order given.

    Cheap to create (headers only); shards are opened when first read, a bounded number at a time.

    Args:
        paths: The shards.
        vocab_size: Number of legal token ids.

    Raises:
        UserError: a damaged shard.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        self._paths = list(paths)
        self._vocab_size = vocab_size
        self._offsets = np.cumsum([0, *map(read_count, self._paths)])
        self._open = functools.lru_cache(_OPEN_SHARDS)(Shard)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return tokens start..stop-1, int64 [stop - start].

        Raises:
            UserError: a token id outside the vocabulary, or a shard damaged meanwhile.
        """
        return np.concatenate([np.empty(0, np.int64), *self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the same tokens, shard by shard."""
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        for index in range(first, len(self._paths)):
            offset = int(self._offsets[index])
            if offset >= stop:
                return
            shard = self._open(self._paths[index])
            piece = shard.read(max(0, start - offset), min(stop - offset, shard.count))
            if len(piece):
                check_ids(self._paths[index], piece, self._vocab_size)
            yield piece.astype(np.int64)
