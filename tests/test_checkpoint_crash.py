"""Ranks killed at every stage of a save, full disks, read-only folders: checkpoints stay intact."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, published, storage, verify
from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint import shard_file as shards
from jepa_dist.errors import SharedError, UserError
from jepa_dist.parallel.world import World
from tests.support.checkpoints import load_newest, make_state, save_steps, start
from tests.support.patience import patience
from tests.support.ranks import run_ranks


def die(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(do: Callable[..., Any]) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        die()

    return act


def write_half(path: Path, text: str) -> None:
    path.write_text(text[: len(text) // 2])


def first_piece(parts: Any) -> Iterator[Any]:
    yield next(pieces(parts))
    die()


pieces = shards._pieces

# By stage: the rank that dies, what it does instead, and the step of the remaining checkpoint.
CRASHES: dict[str, tuple[int, object, str, Callable[..., Any], int]] = {
    "before it stages": (0, folders, "make_staging", die, 3),
    "staging made": (0, folders, "make_staging", die_after(folders.make_staging), 3),
    "before it writes": (1, storage, "write_shard", die, 3),
    "shard half written": (1, shards, "_pieces", first_piece, 3),
    "shard written": (1, storage, "write_shard", die_after(storage.write_shard), 3),
    "state or manifest half written": (0, folders, "write_text", die_after(write_half), 3),
    "before the rename": (0, folders, "publish", die, 3),
    "after the rename": (0, folders, "point_latest_to", die, 8),
    "latest half written": (0, folders, "point_latest_to", die_after(Path.touch), 8),
    "while an old one is deleted": (0, shutil, "rmtree", die, 8),
}


def save_and_die(rank: int, world_size: int, folder: str, crash: str) -> None:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=1))
    victim, owner, name, instead, _ = CRASHES[crash]
    if rank == victim:
        setattr(owner, name, instead)
    checkpointer.save(8, make_state(world, 8), {"step": 8}, wait=True)


def start_again(rank: int, world_size: int, folder: str) -> None:
    Checkpointer(Path(folder), start(world_size), RetentionPolicy(last=1)).close()


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    """A folder with an intact checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_steps, 2, str(folder), [3])
    return folder


@pytest.mark.parametrize("crash", CRASHES)
def test_kill_9_leaves_the_old_checkpoint_or_the_new_one(tmp_path, one_checkpoint, crash):
    folder = tmp_path / "checkpoints"
    shutil.copytree(one_checkpoint, folder)
    with pytest.raises(RuntimeError, match="exited -9"):
        run_ranks(save_and_die, 2, str(folder), crash, timeout=30)
    left = CRASHES[crash][-1]
    assert max(published(folder)) == left
    assert [verify(path) for path in published(folder).values()] == [[]] * len(published(folder))
    for saved, wrong, messages in run_ranks(load_newest, 1, str(folder)):
        assert (saved["step"], wrong, messages) == (left, [], ())


def test_the_next_start_clears_what_a_crash_left(tmp_path, one_checkpoint):
    folder = tmp_path / "checkpoints"
    shutil.copytree(one_checkpoint, folder)
    for crash in ("shard half written", "while an old one is deleted"):
        with pytest.raises(RuntimeError, match="exited -9"):
            run_ranks(save_and_die, 2, str(folder), crash, timeout=30)
    assert len(list(folder.glob(".*"))) > 0
    run_ranks(start_again, 2, str(folder))
    assert list(folder.glob(".*")) == []
    assert list(published(folder)) == [8]


def save_until_killed(rank: int, world_size: int, folder: str, victim: int, delay: float) -> None:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=2))
    if rank == victim:
        threading.Timer(delay, die).start()
    for step in range(1000):
        checkpointer.save(step, make_state(world, step), {"step": step})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_of_any_rank_at_any_moment(tmp_path):
    generator = random.Random(0)
    for number in range(25):
        folder = tmp_path / str(number)
        victim, delay = generator.randrange(3), generator.uniform(0.05, 0.8)
        with pytest.raises(RuntimeError, match="exited"):
            run_ranks(save_until_killed, 3, str(folder), victim, delay, timeout=60)
        whole = published(folder)
        assert [verify(path) for path in whole.values()] == [[]] * len(whole)
        if whole:
            for saved, wrong, messages in run_ranks(load_newest, 2, str(folder)):
                assert (saved["step"], wrong, messages) == (max(whole), [], ())


# ---------------------------------------------------------------------------- refused writes


def big_state(world: World) -> dict[str, torch.Tensor]:
    """2 MiB on each rank."""
    return {f"model/{rank}": torch.ones(2**19) for rank in range(world.world_size)}


def try_to_save(checkpointer: Checkpointer, world: World) -> tuple[tuple[str, ...], float]:
    started = time.monotonic()
    with pytest.raises(SharedError) as caught:
        checkpointer.save(9, big_state(world), {"step": 9}, wait=True)
    return caught.value.problems, time.monotonic() - started


def check_refused(results: list[Any], folder: Path, reason: str) -> None:
    """Assert that all ranks raise one error in seconds, and the old checkpoint is intact."""
    problems = results[0][0]
    assert all(reason in problem and str(folder) in problem for problem in problems)
    assert all(of_rank == problems and seconds < patience(20) for of_rank, seconds in results)
    assert list(published(folder)) == [3]
    assert verify(folder / "step_00000003") == []
    assert list(folder.glob(".*")) == []


def save_beyond_the_limit(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    result = try_to_save(checkpointer, world)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return result


def test_a_write_that_fails_on_one_rank_fails_on_all(tmp_path, one_checkpoint):
    folder = tmp_path / "checkpoints"
    shutil.copytree(one_checkpoint, folder)
    results = run_ranks(save_beyond_the_limit, 2, str(folder))
    check_refused(results, folder, "File too large")


def save_to_full_disk(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=2))
    result = try_to_save(checkpointer, world)
    # The space is free again: a small one fits.
    checkpointer.save(10, {"plain": torch.ones(5)}, {"step": 10}, wait=True)
    shutil.rmtree(Path(folder) / "step_00000010") if rank == 0 else None
    return result


@pytest.fixture
def small_disk(tmp_path, one_checkpoint):
    """A file system of 3 MiB with the checkpoint on it."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    shutil.copytree(one_checkpoint, mount / "checkpoints")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(small_disk):
    folder = small_disk / "checkpoints"
    results = run_ranks(save_to_full_disk, 2, str(folder))
    check_refused(results, folder, "No space left on device")


def save_to_what_became_read_only(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    checkpointer = Checkpointer(Path(folder), world, RetentionPolicy(last=1))
    if rank == 0:
        mount = str(Path(folder).parent)
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    torch.distributed.barrier()
    result = try_to_save(checkpointer, world)
    with pytest.raises(UserError, match="Read-only file system"):
        Checkpointer(Path(folder) / "new", world, RetentionPolicy(last=1))
    return result


def test_a_read_only_folder(small_disk):
    folder = small_disk / "checkpoints"
    results = run_ranks(save_to_what_became_read_only, 2, str(folder))
    check_refused(results, folder, "Read-only file system")
