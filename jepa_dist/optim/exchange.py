"""Bringing whole matrices together on one rank each, and handing the results back as shards.

Matrices have owners, balanced by the cost of orthogonalising them. They travel in a few waves,
two all-to-alls each, however many matrices there are: one takes every matrix's rows to its owner,
one takes the result's rows back. Under HSDP the owners are spread over the replicas, too: the
rows come from the owner's replica, where all of them are, and the result goes to every replica.
So no matrix is computed twice, and the replicas get the same bits.

With S bytes of matrices, W shards and M replicas a rank sends and receives S / (W M) on the way
there and S / W on the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_dist.optim.newton_schulz import cost
from jepa_dist.optim.shards import Grid, rows_of_shard

# While one wave is computed the next one travels; more waves hide more and cost more latency.
MAX_WAVES = 4


@dataclass(frozen=True)
class Matrix:
    """A matrix to be brought together: its key among its fellows, its full shape."""

    key: int
    rows: int
    cols: int

    @property
    def cost(self) -> int:
        """Relative cost of orthogonalising it."""
        return cost(self.rows, self.cols)

    def size(self, shards: int, index: int) -> int:
        """Number of elements in one of its shards."""
        start, stop = rows_of_shard(self.rows, shards, index)
        return (stop - start) * self.cols


def plan_waves(
    grid: Grid, matrices: Sequence[Matrix], device: torch.device, dtype: torch.dtype
) -> list[Wave]:
    """Choose owners and waves; a pure function of the shapes, so every rank finds the same."""
    owned = balance(matrices, grid.size)
    count = min(MAX_WAVES, max(len(own) for own in owned))
    parts = [_split_by_cost(own, count) for own in owned]
    waves = [[part[index] for part in parts] for index in range(count)]
    return [Wave(grid, wave, device, dtype) for wave in waves if any(wave)]


def balance(matrices: Iterable[Matrix], owners: int) -> list[list[Matrix]]:
    """The matrices of each owner: the dearest first, each to the owner with least to do."""
    owned: list[list[Matrix]] = [[] for _ in range(owners)]
    load = [0] * owners
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.cost, matrix.rows, matrix.key)):
        owner = load.index(min(load))
        owned[owner].append(matrix)
        load[owner] += matrix.cost
    return owned


def _split_by_cost(matrices: Sequence[Matrix], count: int) -> list[list[Matrix]]:
    """Cut a list into ``count`` runs of about equal cost (neighbours have equal shapes)."""
    parts: list[list[Matrix]] = [[] for _ in range(count)]
    total = sum(matrix.cost for matrix in matrices)
    done = 0
    for matrix in matrices:
        parts[done * count // total].append(matrix)
        done += matrix.cost
    return parts


@dataclass(frozen=True)
class Transfer:
    """An all-to-all under way. ``sent`` is kept alive until it is over."""

    work: dist.Work
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """The received elements (on CUDA the current stream waits, not the host)."""
        self.work.wait()
        return self.received


class Wave:
    """Some matrices that travel together.

    Args:
        grid: The ranks that hold them.
        owned: For each rank of the grid's group the matrices that it will own.
        device: Where the shards live.
        dtype: In which elements travel.
    """

    def __init__(
        self,
        grid: Grid,
        owned: Sequence[Sequence[Matrix]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._grid, self._owned, self._device, self._dtype = grid, owned, device, dtype
        place = {
            rank: (replica, shard)
            for replica, row in enumerate(grid.ranks)
            for shard, rank in enumerate(row)
        }
        self._places = [place[rank] for rank in range(grid.size)]
        me = dist.get_rank(grid.group)
        self._replica, self._shard = self._places[me]
        self._mine = owned[me]

    def gather(self, shards: Mapping[int, Tensor]) -> Transfer:
        """Launch the way there: this rank's rows of the matrices, by key, to their owners.

        Matrices of which this rank has no row may be left out.
        """
        pieces = [
            [shards[matrix.key] for matrix in own if self._size(matrix, self._shard)]
            if replica == self._replica
            else []
            for own, (replica, _) in zip(self._owned, self._places, strict=True)
        ]
        expected = [
            sum(self._size(matrix, shard) for matrix in self._mine)
            if replica == self._replica
            else 0
            for replica, shard in self._places
        ]
        return self._launch(pieces, expected)

    def matrices(self, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for the way there; the whole matrices that this rank owns, by key."""
        sources = [shard for replica, shard in self._places if replica == self._replica]
        layout = [(matrix, shard) for shard in sources for matrix in self._mine]
        blocks = self._unpack(transfer.wait(), layout)
        return {
            matrix.key: torch.cat([blocks[matrix.key, shard] for shard in sorted(sources)])
            for matrix in self._mine
        }

    def scatter(self, results: Mapping[int, Tensor]) -> Transfer:
        """Launch the way back: the rows of each owned result, by key, to all who hold them."""
        shards = self._grid.shards
        pieces = [
            [
                results[matrix.key][slice(*rows_of_shard(matrix.rows, shards, shard))]
                for matrix in self._mine
            ]
            for _, shard in self._places
        ]
        expected = [sum(self._size(matrix, self._shard) for matrix in own) for own in self._owned]
        return self._launch(pieces, expected)

    def shards(self, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for the way back; this rank's rows of every result, by key, in float32."""
        layout = [(matrix, self._shard) for own in self._owned for matrix in own]
        blocks = self._unpack(transfer.wait().float(), layout)
        return {key: block for (key, _), block in blocks.items()}

    def _size(self, matrix: Matrix, shard: int) -> int:
        return matrix.size(self._grid.shards, shard)

    def _launch(self, pieces: Sequence[Sequence[Tensor]], expected: list[int]) -> Transfer:
        """Send ``pieces[r]`` to rank r of the group and expect so many elements from each."""
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        flat = [piece.reshape(-1) for to_rank in pieces for piece in to_rank]
        sent = torch.cat(flat).to(self._dtype) if flat else nothing
        received = nothing.new_empty(sum(expected))
        sizes = [sum(piece.numel() for piece in to_rank) for to_rank in pieces]
        work = dist.all_to_all_single(
            received, sent, expected, sizes, group=self._grid.group, async_op=True
        )
        return Transfer(work, sent, received)

    def _unpack(
        self, buffer: Tensor, layout: Sequence[tuple[Matrix, int]]
    ) -> dict[tuple[int, int], Tensor]:
        """Views of the shards that lie in ``buffer`` one after the other, by key and shard."""
        views = buffer.split([self._size(matrix, shard) for matrix, shard in layout])
        return {
            (matrix.key, shard): view.view(-1, matrix.cols)
            for view, (matrix, shard) in zip(views, layout, strict=True)
        }
