"""Asynchronous saves as seen by the training loop, and the retention policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Shard

from jepa_dist.checkpoint import (
    Checkpointer,
    RetentionPolicy,
    find_resumable,
    load,
    set_aside_after,
    storage,
    verify,
)
from jepa_dist.checkpoint.manifest import read_manifest, read_state
from jepa_dist.checkpoint.retention import superseded_steps
from jepa_dist.config import ParallelConfig
from jepa_dist.errors import SharedError
from jepa_dist.parallel.world import start_world, stop_world
from tests.support.checkpoints import load_newest, local, make_state, save_steps, start
from tests.support.ranks import run_ranks


@contextmanager
def writing_held() -> Iterator[threading.Event]:
    """Block the writing of shards until the event is set."""
    go, write = threading.Event(), storage.write_shard

    def held(*args: Any) -> Any:
        assert go.wait(60)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_shard", held)
        yield go


@contextmanager
def writing_fails(on_rank: int, rank: int, error: Exception) -> Iterator[None]:
    def fail(*args: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if rank == on_rank:
            patch.setattr(storage, "write_shard", fail)
        yield


# ---------------------------------------------------------------------------- in the background


def train_on_while_saving(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=5))
    state, progress = make_state(world, 1), {"step": 1, "losses": [1.0]}
    with writing_held() as go:
        stall = checkpointer.save(1, state, progress)
        for tensor in state.values():
            local(tensor).fill_(-1)
        progress["losses"].append(2.0)
        for _ in range(20):
            dist.all_reduce(torch.ones(1))
        assert checkpointer.in_flight
        assert checkpointer.poll() == []
        go.set()
        assert not checkpointer.save_completed
        checkpointer.wait()
    (report,) = checkpointer.poll()
    assert not checkpointer.in_flight
    assert not checkpointer.save_completed
    assert report.stall_seconds == stall > 0
    assert report.is_first
    assert report.background_seconds > 0
    assert report.path == Path(folder) / "step_00000001"
    checkpointer.close()
    return report.bytes


def test_training_after_a_snapshot_does_not_change_it(tmp_path):
    sizes = run_ranks(train_on_while_saving, 2, str(tmp_path))
    path = tmp_path / "step_00000001"
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    assert sizes == [sum(file.stat().st_size for file in files)] * 2
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert read_state(path)["losses"] == [1.0]
    for _, wrong, _ in run_ranks(load_newest, 2, str(tmp_path)):
        assert wrong == []


def save_twice_at_once(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=5))
    state = make_state(world, 1)
    with writing_held() as go:
        checkpointer.save(1, state, {"step": 1})
        threading.Timer(0.5, go.set).start()
        for name, tensor in make_state(world, 2).items():
            local(state[name]).copy_(local(tensor))
        stall = checkpointer.save(2, state, {"step": 2})
    assert (Path(folder) / "step_00000001").is_dir()
    held = checkpointer.save(3, make_state(world, 3), {"step": 3}, wait=True)
    assert [report.step for report in checkpointer.poll()] == [1, 2, 3]
    checkpointer.close()
    return stall, held


def test_one_save_at_a_time_and_the_next_one_waits(tmp_path):
    for stall, held in run_ranks(save_twice_at_once, 2, str(tmp_path)):
        assert stall >= 0.4
        assert held > 0
    assert all(verify(path) == [] for path in tmp_path.glob("step_*"))
    assert len(list(tmp_path.glob("step_*"))) == 3
    for saved, wrong, _ in run_ranks(load_newest, 1, str(tmp_path)):
        assert (saved, wrong) == ({"step": 3}, [])


def fail_in_the_background(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=5))
    state = make_state(world, 1)
    problems = []
    calls = [
        checkpointer.close,
        checkpointer.wait,
        lambda: checkpointer.save(9, state, {}),
    ]
    for call in calls:
        with writing_fails(1, rank, OSError(28, "No space left on device", "shard")):
            checkpointer.save(7, state, {})
            while checkpointer.in_flight:
                time.sleep(0.01)
        with pytest.raises(SharedError) as caught:
            call()
        problems.append(caught.value.problems)
    with writing_fails(0, rank, ZeroDivisionError("a bug")):
        checkpointer.save(7, state, {})
        with pytest.raises(RuntimeError, match="a bug"):
            checkpointer.close()
    checkpointer.save(8, state, {"step": 8}, wait=True)
    checkpointer.close()
    return problems


def test_a_failed_save_is_raised_on_every_rank_and_the_next_one_works(tmp_path):
    first, second = run_ranks(fail_in_the_background, 2, str(tmp_path))
    assert first == second
    assert all("shard: cannot be written: No space left" in problem for (problem,) in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000008"]


def save_the_same_step(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=5))
    for seed in (1, 2, 3):
        checkpointer.save(4, make_state(world, seed), {"step": seed})
    checkpointer.close()
    return [report.messages for report in checkpointer.poll()]


def test_the_same_step_again_replaces_nothing_silently(tmp_path):
    messages = run_ranks(save_the_same_step, 2, str(tmp_path))[0]
    path = tmp_path / "step_00000004"
    assert messages == [
        (),
        (f"{path}: existed already; kept as aside_1_step_00000004",),
        (f"{path}: existed already; kept as aside_2_step_00000004",),
    ]
    kept = [path, tmp_path / "aside_1_step_00000004", tmp_path / "aside_2_step_00000004"]
    assert [read_state(one)["step"] for one in kept] == [3, 1, 2]


def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    run_ranks(save_no_json, 1, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def save_no_json(rank: int, world_size: int, folder: str) -> None:
    checkpointer = Checkpointer(Path(folder), start(world_size), RetentionPolicy(last=1))
    with pytest.raises(TypeError):
        checkpointer.save(1, {}, {"path": Path()})
    checkpointer.close()


# ---------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("unhealthy", "keep", "kept"),
    [
        ([], RetentionPolicy(last=1), [60]),
        ([], RetentionPolicy(last=3), [40, 50, 60]),
        ([], RetentionPolicy(last=1, every=30), [30, 60]),
        ([40, 50, 60], RetentionPolicy(last=2), [30, 50, 60]),
        ([60], RetentionPolicy(last=1), [50, 60]),
        ([10, 20, 30, 40, 50, 60], RetentionPolicy(last=1), [60]),
    ],
)
def test_retention_keeps_the_last_every_nth_and_the_last_healthy(unhealthy, keep, kept):
    health = {step: step not in unhealthy for step in (10, 20, 30, 40, 50, 60)}
    assert [step for step in health if step not in superseded_steps(health, keep)] == kept


def test_a_policy_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="last"):
        RetentionPolicy(last=0)


def save_many(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=2, every=4))
    for step in range(1, 8):
        if rank == 0 and step == 6:
            shard = Path(folder) / "step_00000005" / "shard_00000.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1])
        healthy = step < 3
        checkpointer.save(step, make_state(world, step), {"step": step, "healthy": healthy})
        checkpointer.wait()
    checkpointer.close()


def test_retention_on_the_disk_never_counts_or_deletes_a_damaged_one(tmp_path):
    run_ranks(save_many, 2, str(tmp_path))
    # 2 is the last healthy one, 4 a multiple of 4, 5 damaged, 6 and 7 the last two.
    names = sorted(path.name for path in tmp_path.glob("*"))
    assert names == ["latest", *(f"step_{step:08d}" for step in (2, 4, 5, 6, 7))]
    assert not read_manifest(tmp_path / "step_00000007").healthy


def roll_back(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    moved = world.run_on_main(lambda: [path.name for path in set_aside_after(Path(folder), 3)])
    found = find_resumable(Path(folder), world)
    assert found.path is not None
    return moved, found.path.name


def test_after_a_roll_back_later_checkpoints_are_not_resumed_from(tmp_path):
    run_ranks(save_steps, 2, str(tmp_path), [3, 6, 9])
    for moved, newest in run_ranks(roll_back, 2, str(tmp_path)):
        assert moved == ["aside_1_step_00000006", "aside_1_step_00000009"]
        assert newest == "step_00000003"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_snapshots_of_a_cuda_device(tmp_path):
    world = start_world(ParallelConfig())
    try:
        checkpointer = Checkpointer(tmp_path, world, RetentionPolicy(last=2))
        values = torch.arange(float(2**22))
        state = {
            "model/x": distribute_tensor(values.to(world.device), world.mesh, [Shard(0)]),
            "adam_step/x": torch.tensor(3.0, device=world.device),
        }
        checkpointer.save(1, state, {})
        for tensor in state.values():
            local(tensor).zero_()
        checkpointer.close()
        load(tmp_path / "step_00000001", state, world)
        assert torch.equal(local(state["model/x"]).cpu(), values)
        assert state["adam_step/x"].item() == 3
    finally:
        stop_world()
