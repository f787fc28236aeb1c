"""Damaged and hostile checkpoints: reported, skipped or rejected on every rank, never executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.checkpoint import find_resumable, load, verify
from jepa_dist.checkpoint.folder import published
from jepa_dist.checkpoint.manifest import FileEntry, Manifest, digest_of, fingerprint, read_manifest
from jepa_dist.errors import UserError
from tests.support.checkpoints import local, make_state, save_steps, start
from tests.support.patience import patience
from tests.support.ranks import run_ranks

SHARD = "shard_00001.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Intact checkpoints of steps 3 and 8."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_steps, 2, str(folder), [3, 8])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    copied = tmp_path / "checkpoints"
    shutil.copytree(saved, copied)
    return copied


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def swap_in_a_foreign_one(file: Path) -> None:
    shutil.copy(file.parent.parent / "step_00000003" / file.name, file)


def make_empty(file: Path) -> None:
    file.write_bytes(b"")


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    f"{file} {damage.__name__}": (file, damage)
    for file in (SHARD, "state.json", "manifest.json")
    for damage in (truncate, Path.unlink, flip_a_bit, make_empty, make_a_folder)
} | {
    "shard of another checkpoint": (SHARD, swap_in_a_foreign_one),
    "state of another checkpoint": ("state.json", swap_in_a_foreign_one),
    "manifest of another checkpoint": ("manifest.json", swap_in_a_foreign_one),
}


def try_all(rank: int, world_size: int, folders: list[str]) -> Any:
    """For each folder, return the found checkpoint and the error of loading the damaged one."""
    world = start(world_size)
    state = make_state(world)
    results = []
    for folder in map(Path, folders):
        started = time.monotonic()
        found = find_resumable(folder, world)
        with pytest.raises(UserError) as caught:
            load(folder / "step_00000008", state, world)
        seconds = time.monotonic() - started
        results.append((found, caught.value.problems, seconds))
    return results


def test_every_rank_names_the_damage_and_loads_the_previous_checkpoint(saved, tmp_path):
    for name, (file, damage) in DAMAGES.items():
        shutil.copytree(saved, tmp_path / name)
        damage(tmp_path / name / "step_00000008" / file)
    first, second = run_ranks(try_all, 2, [str(tmp_path / name) for name in DAMAGES])
    for name, one, other in zip(DAMAGES, first, second, strict=True):
        found, problems, seconds = one
        damaged = tmp_path / name / "step_00000008"
        assert one[:2] == other[:2]
        assert seconds < patience(10)
        assert found.path == tmp_path / name / "step_00000003", name
        (message,) = found.messages
        assert message.startswith(f"{damaged}: skipped, damaged or incomplete: ")
        assert "\n" not in message
        assert any(DAMAGES[name][0] in problem for problem in problems), (name, problems)
        assert verify(damaged) != []


def find_nothing(rank: int, world_size: int, folder: str) -> Any:
    world = start(world_size)
    nothing = find_resumable(Path(folder) / "none", world)
    return nothing, find_resumable(Path(folder), world)


def test_an_empty_folder_and_only_damaged_checkpoints_differ(folder):
    for path in published(folder).values():
        flip_a_bit(path / SHARD)
    (folder / "step_00000100").mkdir()
    (folder / "step_7").mkdir()
    (folder / "step_00000200").touch()
    for nothing, damaged in run_ranks(find_nothing, 2, str(folder)):
        assert (nothing.path, nothing.messages) == (None, ())
        assert damaged.path is None
        assert [message.split(":")[0] for message in damaged.messages] == [
            str(folder / name) for name in ("step_00000100", "step_00000008", "step_00000003")
        ]


def test_every_flipped_bit_or_truncation_of_a_manifest_is_detected(folder):
    path = folder / "step_00000008"
    file = path / "manifest.json"
    original = file.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        data = bytearray(original)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        assert verify(path) or json.loads(data) == json.loads(original)
    for _ in range(50):
        file.write_bytes(original[: generator.randrange(len(original) - 3)])
        assert verify(path)
    file.write_bytes(b"[" * 100_000)
    assert verify(path)


def test_another_format_version_is_reported(folder):
    file = folder / "step_00000008" / "manifest.json"
    body = json.loads(file.read_text())
    del body["blake2b"]
    body["format"] = 2
    file.write_text(json.dumps({**body, "blake2b": fingerprint(body)}))
    (problem,) = verify(folder / "step_00000008")
    assert "format 2, expected 1" in problem


# ---------------------------------------------------------------------------- hostile


class Hostile:
    """Unpickling it creates the file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def reseal(path: Path, **changes: Any) -> None:
    """Write a manifest that is consistent with the files in the folder."""
    manifest = read_manifest(path)
    files = {}
    for name in manifest.files:
        data = (path / name).read_bytes()
        files[name] = FileEntry(bytes=len(data), blake2b=digest_of(data).hexdigest())
    changed = Manifest.model_construct(**{**dict(manifest), "files": files, **changes})
    (path / "manifest.json").write_text(changed.seal())


def load_hostile(rank: int, world_size: int, path: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickles")

    world = start(world_size)
    torch.load = pickle.load = refuse
    state = make_state(world)
    before = {name: local(tensor).clone() for name, tensor in state.items()}
    problems: tuple[str, ...] = ()
    try:
        load(Path(path), state, world)
    except UserError as error:
        problems = error.problems
    return problems, [name for name in state if not torch.equal(local(state[name]), before[name])]


def test_pickles_beside_the_listed_files_are_never_opened(folder, tmp_path):
    path, mark = folder / "step_00000008", tmp_path / "executed"
    for name in (".metadata", "__0_0.distcp", "shard_00009.safetensors", "state.pkl"):
        (path / name).write_bytes(pickle.dumps(Hostile(mark)))
    torch.save(Hostile(mark), path / "model.pt")
    assert verify(path) == []
    for problems, changed in run_ranks(load_hostile, 2, str(path)):
        assert problems == ()
        assert len(changed) > 0
    assert not mark.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists()


def test_a_shard_that_is_a_pickle_is_refused_even_if_its_digest_holds(folder, tmp_path):
    path, mark = folder / "step_00000008", tmp_path / "executed"
    torch.save(Hostile(mark), path / SHARD)
    reseal(path)
    (problem,) = verify(path)
    assert problem.startswith(f"{path / SHARD}: damaged: not a whole safetensors file")
    first, second = run_ranks(load_hostile, 2, str(path))
    assert first[0] == second[0]
    assert first[0][0].startswith(f"{path / SHARD}: damaged")
    assert not mark.exists()


def test_a_state_that_is_a_pickle_is_refused_even_if_its_digest_holds(folder, tmp_path):
    path, mark = folder / "step_00000008", tmp_path / "executed"
    (path / "state.json").write_bytes(pickle.dumps(Hostile(mark)))
    reseal(path)
    for problems, _ in run_ranks(load_hostile, 2, str(path)):
        assert problems == (f"{path / 'state.json'}: damaged: not the state of a run",)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../step_00000003/state.json", "/etc/passwd", ".hidden", ""])
def test_a_manifest_cannot_point_outside_its_folder(folder, name):
    path = folder / "step_00000008"
    manifest = read_manifest(path)
    reseal(path, files={**manifest.files, name: manifest.files["state.json"]})
    assert any("should match pattern" in problem for problem in verify(path))
