"""Exchange of sharded matrices: gather each on the rank that owns it, scatter the result's rows.

Owners are balanced by the cost of orthogonalization. Matrices are sent in a few waves of two
all-to-alls each, however many there are: the first sends every matrix's rows to its owner, the
second returns the rows of the result. Under HSDP the owners are spread over the replicas: the rows
come from the owner's replica, which holds all of them, and the result is sent to every replica. So
no matrix is computed twice, and all replicas receive the same bits.

With S bytes of matrices, W shards and M replicas a rank sends and receives S / (W M) bytes in the
first all-to-alls and S / W in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from jepa_dist.optim.local_shards import Grid, rows_of_shard
from jepa_dist.optim.newton_schulz import cost

# One wave is computed while the next is in flight; more waves hide more time and add latency.
MAX_WAVES = 4


@dataclass(frozen=True)
class Matrix:
    """A matrix to exchange: the index of its parameter, and its full shape."""

    key: int
    rows: int
    cols: int

    @property
    def cost(self) -> int:
        """Relative cost of orthogonalization."""
        return cost(self.rows, self.cols)

    def size(self, shards: int, index: int) -> int:
        """Return the number of elements of the shard with this index."""
        start, stop = rows_of_shard(self.rows, shards, index)
        return (stop - start) * self.cols


def plan_waves(
    grid: Grid, matrices: Sequence[Matrix], device: torch.device, dtype: torch.dtype
) -> list[Wave]:
    """Choose owners and waves: a pure function of the shapes, hence equal on all ranks."""
    owned = balance(matrices, grid.size)
    count = min(MAX_WAVES, max(len(own) for own in owned))
    parts = [_split_by_cost(own, count) for own in owned]
    waves = [[part[index] for part in parts] for index in range(count)]
    return [Wave(grid, wave, device, dtype) for wave in waves if any(wave)]


def balance(matrices: Iterable[Matrix], owners: int) -> list[list[Matrix]]:
    """Assign matrices to owners: most expensive first, each to the least-loaded owner."""
    owned: list[list[Matrix]] = [[] for _ in range(owners)]
    load = [0] * owners
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.cost, matrix.rows, matrix.key)):
        owner = load.index(min(load))
        owned[owner].append(matrix)
        load[owner] += matrix.cost
    return owned


def _split_by_cost(matrices: Sequence[Matrix], count: int) -> list[list[Matrix]]:
    """Split into ``count`` runs of about equal cost (adjacent matrices have equal shapes)."""
    parts: list[list[Matrix]] = [[] for _ in range(count)]
    total = sum(matrix.cost for matrix in matrices)
    done = 0
    for matrix in matrices:
        parts[done * count // total].append(matrix)
        done += matrix.cost
    return parts


@dataclass(frozen=True)
class Transfer:
    """An all-to-all in flight, which keeps ``sent`` alive until it completes."""

    work: dist.Work
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """Return the received elements (on CUDA the current stream waits, not the host)."""
        self.work.wait()
        return self.received


class Wave:
    """Matrices that are exchanged together.

    Args:
        grid: The ranks that hold them.
        owned: For each rank of the grid's group, the matrices that it owns.
        device: Device of the shards.
        dtype: Dtype of the elements that are sent.
    """

    def __init__(
        self,
        grid: Grid,
        owned: Sequence[Sequence[Matrix]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._grid, self._device, self._dtype = grid, device, dtype
        place = {
            rank: (replica, shard)
            for replica, row in enumerate(grid.ranks)
            for shard, rank in enumerate(row)
        }
        places = [place[rank] for rank in range(grid.size)]
        me = dist.get_rank(grid.group)
        my_replica, my_shard = places[me]
        self._mine = owned[me]
        # Shard index of each rank that sends to this one (its replica), in rank order.
        self._sources = [shard for replica, shard in places if replica == my_replica]
        self._targets = [shard for _, shard in places]
        # On the device: indexing by a list would copy and synchronize in every step.
        self._target_shards = torch.tensor(self._targets, device=device)
        # Sizes and order of all transfers, equal in every step; here: sizes of this rank's shards.
        mine_here = [self._size_of_mine(shard) for shard in range(grid.shards)]
        here = [[(m, m.size(grid.shards, my_shard)) for m in own] for own in owned]
        to_owners = [
            [(m, size) for m, size in own if size] if replica == my_replica else []
            for own, (replica, _) in zip(here, places, strict=True)
        ]
        self._keys_there = [matrix.key for own in to_owners for matrix, _ in own]
        self._sent_there = [sum(size for _, size in own) for own in to_owners]
        self._received_there = [
            mine_here[shard] if replica == my_replica else 0 for replica, shard in places
        ]
        self._sent_back = [mine_here[shard] for shard in self._targets]
        self._received_back = [sum(size for _, size in own) for own in here]
        self._arriving = [pair for own in here for pair in own]
        self._is_even = all(matrix.rows % grid.shards == 0 for matrix in self._mine)

    def gather(self, shards: Mapping[int, Tensor]) -> Transfer:
        """Launch the all-to-all that sends this rank's rows, by key, to the owners.

        Args:
            shards: [local rows, cols] each; matrices of which this rank has no row may be absent.
        """
        rows = [shards[key] for key in self._keys_there]
        sent = _flatten_dense_tensors(rows) if rows else self._empty(0)
        return self._launch(sent, self._sent_there, self._received_there)

    def matrices(self, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for ``gather``; return the matrices [rows, cols] that this rank owns, by key."""
        buffer = transfer.wait()
        # Flat [source, matrix, rows, cols]; the last sources may have fewer rows of a matrix.
        if self._is_even and self._sources == sorted(self._sources) and self._mine:
            sizes = [matrix.size(self._grid.shards, 0) for matrix in self._mine]
            parts = buffer.view(len(self._sources), -1).split(sizes, dim=1)
            return {
                matrix.key: part.reshape(matrix.rows, matrix.cols)
                for matrix, part in zip(self._mine, parts, strict=True)
            }
        layout = [(matrix, shard) for shard in self._sources for matrix in self._mine]
        sizes = [matrix.size(self._grid.shards, shard) for matrix, shard in layout]
        blocks = {
            (matrix.key, shard): part.view(-1, matrix.cols)
            for (matrix, shard), part in zip(layout, buffer.split(sizes), strict=True)
        }
        return {
            matrix.key: torch.cat([blocks[matrix.key, shard] for shard in sorted(self._sources)])
            for matrix in self._mine
        }

    def scatter(self, results: Mapping[int, Tensor]) -> Transfer:
        """Launch the all-to-all that returns the rows of each owned result to all their holders."""
        return self._launch(self._rows_back(results), self._sent_back, self._received_back)

    def shards(self, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for ``scatter``; return this rank's rows of every result, by key, in float32."""
        parts = transfer.wait().float().split([size for _, size in self._arriving])
        return {
            matrix.key: part.view(-1, matrix.cols)
            for (matrix, _), part in zip(self._arriving, parts, strict=True)
        }

    def _rows_back(self, results: Mapping[int, Tensor]) -> Tensor:
        """Return the elements to send, flat: [target, matrix, rows, cols]."""
        if not self._mine:
            return self._empty(0)
        shards = self._grid.shards
        if self._is_even:
            by_shard = torch.cat([results[m.key].reshape(shards, -1) for m in self._mine], dim=1)
            if self._targets == list(range(shards)):
                return by_shard.flatten()
            return by_shard.index_select(0, self._target_shards).flatten()
        pieces = [
            results[matrix.key][slice(*rows_of_shard(matrix.rows, shards, shard))]
            for shard in self._targets
            for matrix in self._mine
        ]
        return _flatten_dense_tensors(pieces)

    def _size_of_mine(self, shard: int) -> int:
        return sum(matrix.size(self._grid.shards, shard) for matrix in self._mine)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)

    def _launch(self, sent: Tensor, sizes: list[int], expected: list[int]) -> Transfer:
        """Send ``sizes[r]`` elements to rank r of the group, receive ``expected[r]`` from it."""
        sent, received = sent.to(self._dtype), self._empty(sum(expected))
        work = dist.all_to_all_single(
            received, sent, expected, sizes, group=self._grid.group, async_op=True
        )
        return Transfer(work, sent, received)
