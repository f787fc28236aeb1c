"""Clipping by the global gradient norm, over shards.

Each rank sums the squares it holds; one all-reduce over the sharding mesh dimension adds them up
(replicas hold the same squares and are not counted again). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.optim.local_shards import local_gradients, shard_dim

_EPS = 1e-6  # the reference's (golden README section 4), and torch's


class GradientClip:
    """Clipping of all gradients, in place, by the factor min(1, max_norm / (norm + 1e-6)).

    Args:
        parameters: Plain tensors (the same on every rank) or DTensors sharded over one mesh
            dimension; those without gradient are skipped. The same list on every rank.
        max_norm: Limit of the global L2 norm; 0 only computes the norm.
    """

    def __init__(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        self._max_norm = max_norm
        self._by_group: dict[dist.ProcessGroup | None, list[Tensor]] = {}
        for parameter in parameters:
            self._by_group.setdefault(_shard_group(parameter), []).append(parameter)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clip the gradients that exist now. Collective.

        Returns:
            The norm before clipping, 0-dim float32, on the gradients' device. If any gradient is
            not finite, neither is the norm, nor any gradient afterwards.
        """
        squares, gradients = [], list[Tensor]()
        for group, parameters in self._by_group.items():
            shards = local_gradients(parameters)
            squares.append(_sum_of_squares(shards, group, parameters[0].device))
            gradients += shards
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        if self._max_norm > 0 and gradients:
            torch._foreach_mul_(gradients, torch.clamp(self._max_norm / (norm + _EPS), max=1.0))
        return norm


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip once: see ``GradientClip``."""
    return GradientClip(parameters, max_norm)()


def _shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks to sum the parameter's squares over; None if this rank holds all of it."""
    if not isinstance(parameter, DTensor):
        return None
    dim = shard_dim(parameter)
    if dim is None or parameter.device_mesh.size(dim) == 1:
        return None
    return parameter.device_mesh.get_group(dim)


def _sum_of_squares(
    gradients: list[Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Return the sum of squares of these shards over the group; 0-dim float32."""
    if gradients:
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        square = torch.linalg.vector_norm(torch.stack(norms)).square()
    else:
        square = torch.zeros((), device=device)
    if group is not None:
        dist.all_reduce(square, group=group)
    return square
