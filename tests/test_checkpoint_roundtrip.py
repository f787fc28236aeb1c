"""Checkpoints of real gloo ranks load bit-equal at another world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as torch_load

from jepa_dist.checkpoint import load
from jepa_dist.checkpoint.manifest import read_manifest
from jepa_dist.errors import UserError
from tests.support.checkpoints import (
    SHAPES,
    load_newest,
    local,
    make_state,
    save_steps,
    start,
    unequal,
    whole,
)
from tests.support.ranks import run_ranks


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
