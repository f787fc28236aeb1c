"""Checkpoints of known tensors, saved and loaded by the ranks of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, find_resumable, load
from jepa_dist.config import ParallelConfig
from jepa_dist.parallel.world import World, start_world

SHAPES: dict[str, tuple[int, ...]] = {
    "model/uneven": (7, 3),
    "model/few_rows": (2, 5),
    "model/one_row": (1, 4),
    "model/vector": (11,),
    "model/empty": (0, 3),
    "exp_avg/uneven": (7, 3),
    "adam_step/uneven": (),
    "plain": (5, 2),
    "plain_bf16": (3,),
}
PLAIN = ("adam_step/uneven", "plain", "plain_bf16")


def whole(name: str, step: int = 0) -> Tensor:
    """Return the value of a tensor at a step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    value = torch.rand(SHAPES[name], generator=generator)
    return value.bfloat16() if name.endswith("bf16") else value


def make_state(world: World, step: int = 0) -> dict[str, Tensor]:
    """Return all kinds of tensors, sharded by rows as FSDP2 and HSDP do."""
    placements = [Replicate()] * (world.mesh.ndim - 1) + [Shard(0)]
    return {
        name: whole(name, step)
        if name in PLAIN
        else distribute_tensor(whole(name, step), world.mesh, placements)
        for name in SHAPES
    }


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unequal(state: dict[str, Tensor], step: int = 0) -> list[str]:
    """Return the names of tensors that differ from their expected values."""
    gathered = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }
    return [name for name, tensor in gathered.items() if not torch.equal(tensor, whole(name, step))]


def start(world_size: int, replicas: int = 1) -> World:
    """Return the world, of one replica if the ranks do not divide by ``replicas``."""
    return start_world(ParallelConfig(dp_replicate=replicas if world_size % replicas == 0 else 1))


def save_steps(rank: int, world_size: int, folder: str, steps: list[int], replicas: int = 1) -> Any:
    """Save a checkpoint of each step; return the reports of the saves."""
    world = start(world_size, replicas)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=10))
    for step in steps:
        checkpointer.save(step, make_state(world, step), {"step": step, "nested": {"a": [1.5]}})
    checkpointer.close()
    return checkpointer.poll()


def load_newest(rank: int, world_size: int, folder: str, replicas: int = 1) -> Any:
    """Load the newest checkpoint; return its values, the wrong tensors' names, and messages."""
    world = start(world_size, replicas)
    state = make_state(world)
    for tensor in state.values():
        local(tensor).zero_()
    found = find_resumable(Path(folder), world)
    assert found.path is not None, found.messages
    saved = load(found.path, state, world, verified=True)
    return saved, unequal(state, saved["step"]), found.messages
