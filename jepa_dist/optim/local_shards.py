"""A DTensor as the optimizers use it: this rank's shard, and which ranks hold the others.

FSDP2 shards every parameter by rows (dimension 0) over one mesh dimension and replicates it over
the others. Row r of R rows on W shards is in shard r // ceil(R / W), as ``torch.chunk`` divides:
the last shards may be smaller or empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, sharing its memory; not differentiable."""
    # Faster than ``to_local``, and called hundreds of times per step.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def local_gradient(parameter: Tensor) -> Tensor:
    """Return this rank's shard of the gradient, which must exist."""
    assert parameter.grad is not None
    return local(parameter.grad)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's non-empty shards of all gradients that exist."""
    shards = [local(p.grad) for p in parameters if p.grad is not None]
    return [shard for shard in shards if shard.numel()]


def shard_dim(tensor: DTensor) -> int | None:
    """Return the mesh dimension that shards the rows, or None if every rank holds all of them.

    Raises:
        ValueError: any other placement (columns split, partial sums, two sharded dimensions).
    """
    dims = [d for d, placement in enumerate(tensor.placements) if placement != Replicate()]
    if not dims:
        return None
    if len(dims) > 1 or tensor.placements[dims[0]] != Shard(0):
        raise ValueError(
            f"placements {tensor.placements}: the optimizers need rows sharded over one mesh "
            "dimension and replicas over the others, as fully_shard makes them"
        )
    return dims[0]


@dataclass(frozen=True)
class Grid:
    """The ranks that hold one DTensor: ``ranks[m][w]`` has shard w of replica m.

    ``ranks`` are ranks within ``group``, which spans the whole mesh.
    """

    group: dist.ProcessGroup
    ranks: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks) * len(self.ranks[0])

    @property
    def shards(self) -> int:
        """Number of shards of one replica."""
        return len(self.ranks[0])


def grid_of(mesh: DeviceMesh, dim: int | None) -> Grid:
    """Return the grid of ``mesh`` whose dimension ``dim`` shards (None: every rank is a replica).

    Raises:
        ValueError: a mesh of several dimensions that does not span the world.
    """
    ranks = mesh.mesh.reshape(-1, 1)
    if dim is not None:
        ranks = mesh.mesh.movedim(dim, -1).reshape(-1, mesh.size(dim))
    group = _group_over(mesh)
    return Grid(
        group,
        tuple(tuple(dist.get_group_rank(group, rank) for rank in row) for row in ranks.tolist()),
    )


def _group_over(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    if world is None or mesh.size() != world.size():
        raise ValueError(f"{mesh}: must span all {dist.get_world_size()} ranks of the world")
    return world


def rows_of_shard(rows: int, shards: int, index: int) -> tuple[int, int]:
    """Return the first row, and one past the last, of shard ``index`` of ``shards``."""
    chunk = -(-rows // shards)
    return min(rows, chunk * index), min(rows, chunk * (index + 1))
