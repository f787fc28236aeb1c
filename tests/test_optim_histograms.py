"""Distributions of sharded tensors are those of the whole ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from jepa_dist.optim.histograms import distributions
from tests.support.ranks import run_ranks

ROWS = 7  # uneven, and fewer than four shards can share: one of them is empty


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, 5, generator=generator)
    return weight, torch.full((ROWS, 5), torch.nan).index_fill_(0, torch.tensor([3]), 1e-20)


def of_shards(rank: int, world_size: int, replicas: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (replicas, world_size // replicas))
    placements = [Replicate(), Shard(0)]
    weight, gradient = (distribute_tensor(tensor, mesh, placements) for tensor in whole())
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    found = distributions([("p", parameter)])
    dist.barrier()
    return {name: value._asdict() for name, value in found.items()}


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 1), (4, 1), (4, 2)])
def test_shards_count_as_the_whole(ranks: int, replicas: int) -> None:
    weight, gradient = whole()
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    plain = {name: value._asdict() for name, value in distributions([("p", parameter)]).items()}
    for of_rank in run_ranks(of_shards, ranks, replicas):
        assert of_rank.keys() == plain.keys() == {"weights/p", "gradients/p"}
        for name, values in plain.items():
            for key, expected in values.items():
                assert of_rank[name][key] == pytest.approx(expected, rel=1e-12), (name, key)


def test_counts_are_numpys() -> None:
    weight = whole()[0]
    found = distributions([("p", nn.Parameter(weight))])["weights/p"]
    values = weight.double().numpy()
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.num == values.size == sum(found.counts)
    assert found.sum == pytest.approx(values.sum())
    assert found.sum_squares == pytest.approx((values**2).sum())
    below = [np.count_nonzero(values <= limit) for limit in found.limits]
    assert np.cumsum(found.counts).tolist() == below
    assert found.limits == sorted(found.limits)
    assert max(count for count in found.counts) <= 4


def test_what_is_not_finite_is_left_out() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 0.0, 3e38]))
    parameter.grad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = distributions([("p", parameter)])
    assert found.keys() == {"weights/p"}
    assert found["weights/p"].counts[0] == found["weights/p"].counts[-1] == 1
