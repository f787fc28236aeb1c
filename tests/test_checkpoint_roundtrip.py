"""Checkpoints of real gloo ranks load bit-equal at another world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, find_resumable, load
from jepa_dist.checkpoint.manifest import read_manifest
from jepa_dist.config import ParallelConfig
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World, start_world
from tests.ranks import run_ranks

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
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unequal(state: dict[str, Tensor], step: int = 0) -> list[str]:
    """Return the names of tensors that differ from their expected values."""
    gathered = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }
    return [name for name, tensor in gathered.items() if not torch.equal(tensor, whole(name, step))]


def start(world_size: int, replicas: int = 1) -> World:
    return start_world(ParallelConfig(dp_replicate=replicas if world_size % replicas == 0 else 1))


def save_steps(rank: int, world_size: int, folder: str, steps: list[int], replicas: int = 1) -> Any:
    world = start(world_size, replicas)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=10))
    for step in steps:
        checkpointer.save(step, make_state(world, step), {"step": step, "nested": {"a": [1.5]}})
    checkpointer.close()
    return checkpointer.poll()


def load_newest(rank: int, world_size: int, folder: str, replicas: int = 1) -> Any:
    world = start(world_size, replicas)
    state = make_state(world)
    for tensor in state.values():
        local(tensor).zero_()
    found = find_resumable(Path(folder), world)
    assert found.path is not None, found.messages
    saved = load(found.path, state, world, verified=True)
    return saved, unequal(state, saved["step"]), found.messages


@pytest.fixture(scope="module", params=[1, 2], ids=["fsdp", "hsdp"])
def saved_at_four(request, tmp_path_factory):
    """Checkpoints of the steps 3 and 8, sharded over four ranks or two replicas of two."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_steps, 4, str(folder), [3, 8], request.param)
    return folder


@pytest.mark.parametrize(
    ("world_size", "replicas"), [(4, 1), (4, 2), (2, 1), (2, 2), (1, 1), (3, 1)]
)
def test_saved_at_four_ranks_loads_bit_equal_at_any_other_number(
    saved_at_four, world_size, replicas
):
    results = run_ranks(load_newest, world_size, str(saved_at_four), replicas)
    for saved, wrong, messages in results:
        assert saved == {"step": 8, "nested": {"a": [1.5]}}
        assert wrong == []
        assert messages == ()


def test_replicas_share_the_writing(tmp_path):
    run_ranks(save_steps, 4, str(tmp_path), [1], 2)
    manifest = read_manifest(tmp_path / "step_00000001")
    sizes = [entry.bytes for name, entry in manifest.files.items() if name != "state.json"]
    assert len(sizes) == 4
    values = sum(whole(name).numel() * whole(name).element_size() for name in SHAPES)
    stored = sum(
        torch.Size(chunk.shape).numel() * (2 if entry.dtype == "BF16" else 4)
        for entry in manifest.tensors.values()
        for chunk in entry.chunks
    )
    assert stored == values


def test_the_files_are_readable_with_pytorchs_own_reader(tmp_path):
    run_ranks(save_steps, 3, str(tmp_path), [5])
    state = {name: torch.zeros_like(whole(name)) for name in SHAPES}
    torch_load(
        state,
        storage_reader=HuggingFaceStorageReader(str(tmp_path / "step_00000005")),
        no_dist=True,
    )
    assert unequal(state, 5) == []


def load_something_else(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    state = make_state(world)
    before = {name: local(tensor).clone() for name, tensor in state.items()}
    asked = dict(state)
    del asked["plain"]
    asked["ema/uneven"] = torch.zeros(7, 3)
    asked["model/vector"] = torch.zeros(12)
    asked["adam_step/uneven"] = torch.zeros((), dtype=torch.float64)
    with pytest.raises(UserError) as caught:
        load(Path(folder) / "step_00000001", asked, world)
    assert all(torch.equal(local(state[name]), before[name]) for name in state)
    return caught.value.problems


def test_every_rank_lists_all_mismatches(tmp_path):
    run_ranks(save_steps, 2, str(tmp_path), [1])
    first, second = run_ranks(load_something_else, 2, str(tmp_path))
    path = tmp_path / "step_00000001"
    assert first == second
    assert set(first) == {
        f"{path}: ema/uneven: missing",
        f"{path}: plain: not in this model",
        f"{path}: model/vector: shape (11,), expected (12,)",
        f"{path}: adam_step/uneven: dtype F32, expected F64",
    }
