"""Distributions of whole parameters and gradients, counted shard by shard."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.optim.local_shards import grid_of, local, shard_dim

# Upper ends of the buckets: zero, and powers of 1.1 on both sides, as TensorBoard's own.
_POSITIVE = [1.1**power for power in range(-290, 146)]  # 1e-12 to 1e6
_LIMITS = (*(-limit for limit in reversed(_POSITIVE)), 0.0, *_POSITIVE, math.inf)


class Distribution(NamedTuple):
    """Statistics and histogram of a tensor's finite elements."""

    minimum: float
    maximum: float
    num: float
    sum: float
    sum_squares: float
    limits: list[float]
    """Upper ends of the buckets, ascending; without those beyond minimum and maximum."""
    counts: list[float]
    """Elements in each bucket."""


def distributions(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Distribution]:
    """Return the distribution of every parameter (``weights/NAME``) and gradient, if any
    (``gradients/NAME``).

    Collective if parameters are DTensors: waits for the device, and sums over ranks. Tensors
    without finite elements are omitted.
    """
    tensors = {
        f"{kind}/{name}": tensor
        for name, parameter in named_parameters
        for kind, tensor in (("weights", parameter), ("gradients", parameter.grad))
        if tensor is not None
    }
    sums = torch.stack([_sums(tensor) for tensor in tensors.values()])
    ends = torch.stack([_ends(tensor) for tensor in tensors.values()])
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        dist.all_reduce(sums)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    rows = zip(tensors, sums.tolist(), ends.tolist(), strict=True)
    return {name: _distribution(sums, ends) for name, sums, ends in rows if sums[0] > 0}


def _sums(tensor: Tensor) -> Tensor:
    """Return this rank's share of number, sum, sum of squares and counts, float64."""
    values = _finite(tensor)
    limits = torch.tensor(_LIMITS, dtype=torch.float32, device=values.device)
    counts = torch.bincount(torch.bucketize(values, limits), minlength=len(_LIMITS)).double()
    wide = values.double()
    row = torch.cat([torch.stack([counts.sum(), wide.sum(), wide.square().sum()]), counts])
    return row / _replicas(tensor)


def _ends(tensor: Tensor) -> Tensor:
    """Return minus the minimum, and the maximum; -inf without elements."""
    values = _finite(tensor)
    nothing = values.new_tensor([-math.inf])
    return torch.stack([torch.cat([nothing, -values]).max(), torch.cat([nothing, values]).max()])


def _finite(tensor: Tensor) -> Tensor:
    values = local(tensor).float().flatten()
    return values[values.isfinite()]


def _replicas(tensor: Tensor) -> int:
    """Return how many ranks hold each element."""
    if not isinstance(tensor, DTensor):
        return 1
    return len(grid_of(tensor.device_mesh, shard_dim(tensor)).ranks)


def _distribution(sums: list[float], ends: list[float]) -> Distribution:
    num, total, squares, *counts = sums
    filled = [bucket for bucket, count in enumerate(counts) if count]
    shown = slice(filled[0], filled[-1] + 1)
    return Distribution(-ends[0], ends[1], num, total, squares, list(_LIMITS[shown]), counts[shown])
