"""Replicas hold identical bits, or the run ends before its first step; meshes have minimal rank."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from jepa_dist.config import ParallelConfig
from jepa_dist.errors import TrainingError
from jepa_dist.parallel.replicas import check_replicas
from jepa_dist.parallel.world import build_mesh, start_world
from tests.support.ranks import run_ranks


def compare(rank: int, world_size: int) -> tuple[int, bool, list[str]]:
    """Compare equal tensors, then one different element, two exchanged ones, a different scalar."""
    world = start_world(ParallelConfig(dp_replicate=2))
    alone = build_mesh(ParallelConfig(), world_size, world.device)
    uses_default_group = alone.get_group().size() == dist.get_world_size()
    whole = torch.arange(12, dtype=torch.float32).view(6, 2)
    rows = distribute_tensor(whole, world.mesh, [Replicate(), Shard(0)])
    tensors = {"model/rows": rows, "model/empty": torch.empty(0), "adam_step/rows": torch.ones(())}
    check_replicas(tensors, world)

    def problem() -> str:
        try:
            check_replicas(tensors, replace(world))
        except TrainingError as error:
            return str(error)
        return "none"

    problems = []
    shard = rows.to_local()
    if rank == 3:
        shard[0, 0] = shard[0, 0].nextafter(torch.tensor(torch.inf))
    problems.append(problem())
    if rank == 3:
        shard.copy_(whole[3:].flip(0))
    problems.append(problem())
    if rank == 3:
        shard.copy_(whole[3:])
        tensors["adam_step/rows"] = torch.zeros(())
    problems.append(problem())
    return alone.ndim, uses_default_group, problems


def test_a_replica_that_differs_is_named_on_every_rank() -> None:
    for ndim, uses_default_group, problems in run_ranks(compare, 4):
        assert (ndim, uses_default_group) == (1, True)
        first, swapped, scalar = problems
        for text in (first, swapped):
            assert "model/rows (ranks 1 against 3)" in text
            assert "adam_step" not in text
            assert "\n" not in text
        assert "adam_step/rows (ranks 0, 1, 2 against 3)" in scalar
        assert "model/" not in scalar
