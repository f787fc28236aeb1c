"""``python -m jepa_dist.checkpoint`` on checkpoints of a real model, optimizer and EMA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.build import build_ema, build_joint_model, build_optimizer
from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, load
from jepa_dist.checkpoint.__main__ import main
from jepa_dist.config import Config, to_dict
from jepa_dist.interop.safetensors_io import check_tensors, read_description, read_state
from jepa_dist.model.gpt import GPT
from jepa_dist.parallel.world import World, start_world
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config


def run_config(folder: str) -> Config:
    """Return a config with an objective that has parameters, which no export contains."""
    changes = {"optim__ema_decay": 0.9, "optim__matrix": "muon", "jepa__objective": "next_state"}
    return tiny_config(Path(folder), **changes)


def build_state(config: Config, world: World) -> dict[str, Tensor]:
    root, _ = build_joint_model(config, world)
    named = root.trained_parameters()
    ema, optimizer = build_ema(config, named), build_optimizer(config, named)
    parameters = {
        f"{kind}/{name}": parameter
        for kind, module in (("model", root.model), ("objective", root.objective))
        for name, parameter in module.named_parameters()
    }
    return parameters | optimizer.state_tensors() | ema.state_tensors()


@torch.no_grad()
def train_and_save(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    config = run_config(folder)
    world = start_world(config.parallel)
    checkpointer = Checkpointer(Path(folder) / "run/checkpoints", world, RetentionPolicy(last=5))
    state = build_state(config, world)
    progress = {"config": to_dict(config), "phase": 2, "data_fingerprint": {"train": 1}}
    for step in (10, 20, 30):
        for name, tensor in state.items():
            tensor.add_(1 if name.startswith("model/") else 0.5)
        checkpointer.save(step, state, progress | {"step": step, "healthy": step < 30})
    checkpointer.close()
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of the steps 10, 20, 30 (unhealthy), and its last full tensors."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", run_ranks(train_and_save, 2, str(folder))[0]


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def call(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def damage(run: Path, step: int) -> Path:
    file = run / f"checkpoints/step_{step:08d}/shard_00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return file


def load_whole(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    config = run_config(folder)
    world = start_world(config.parallel)
    state = build_state(config, world)
    load(Path(folder) / "run/checkpoints/step_00000030", state, world)
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        for name, tensor in state.items()
    }


def test_model_optimizer_and_average_load_at_another_world_size(trained):
    run, expected = trained
    found = run_ranks(load_whole, 3, str(run.parent))[0]
    kinds = {"model", "objective", "ema", "exp_avg", "momentum"}
    assert {name.split("/")[0] for name in found} >= kinds
    assert {"objective/gate.weight", "ema/objective.gate.weight"} <= found.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_ls_lists_step_size_age_ranks_health_and_damage(run, capsys):
    damage(run, 20)
    (run / "checkpoints/step_00000025").mkdir()
    (run / "checkpoints/step_00000010").rename(run / "checkpoints/aside_1_step_00000010")
    assert call("ls", run) == 0
    head, first, second, third, aside = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "age", "ranks", "health", "verified"]
    assert first.split()[0] == "20"
    assert "KiB" in first
    assert "no: " in first
    assert "its digest does not match" in first
    assert second.split()[:2] == ["25", "?"]
    assert "not a finished checkpoint" in second
    assert third.split()[-3:] == ["2", "UNHEALTHY", "yes"]
    assert aside.startswith("aside_1_step_00000010: set aside")


def test_verify_names_what_is_damaged(run, capsys):
    assert call("verify", run) == 0
    assert capsys.readouterr().out.count(": intact") == 3
    file = damage(run, 20)
    assert call("verify", run) == 1
    assert f"{file}: damaged: its digest does not match" in capsys.readouterr().out
    assert call("verify", run / "checkpoints/step_00000010") == 0


def test_diff_shows_configuration_tensors_and_norms(run, trained, capsys):
    checkpoints = run / "checkpoints"
    assert call("diff", checkpoints / "step_00000010", checkpoints / "step_00000020") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "step: 10 -> 20"
    name, expected = next(
        (name, tensor) for name, tensor in trained[1].items() if name.startswith("model/")
    )
    norm = expected.numel() ** 0.5
    assert any(line.startswith(f"{name}: |difference| {norm:.4g} at |first| ") for line in lines)
    assert call("diff", run, run / "checkpoints/step_00000030") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no difference"


def save_variant(rank: int, world_size: int, folder: str) -> None:
    config = tiny_config(Path(folder), train__steps=99)
    world = start_world(config.parallel)
    checkpointer = Checkpointer(Path(folder) / "checkpoints", world, RetentionPolicy(last=1))
    tensors = {"model/wide": torch.ones(int(folder[-1]), 3), f"model/{folder[-1]}": torch.ones(1)}
    state = {"config": {**to_dict(config), "seed": int(folder[-1])}}
    checkpointer.save(1, tensors, state, wait=True)


def test_diff_shows_names_shapes_and_settings_that_differ(tmp_path, capsys):
    for number in ("2", "3"):
        run_ranks(save_variant, 1, str(tmp_path / number))
    assert call("diff", tmp_path / "2", tmp_path / "3") == 1
    lines = capsys.readouterr().out.splitlines()
    paths = [tmp_path / number / "checkpoints/step_00000001" for number in ("2", "3")]
    assert "config seed: 2 -> 3" in lines
    assert f"model/2: only in {paths[0]}" in lines
    assert f"model/3: only in {paths[1]}" in lines
    assert "model/wide: F32 [2, 3] -> F32 [3, 3]" in lines


@pytest.mark.parametrize(
    ("flag", "prefix", "stem"), [([], "model", "model"), (["--ema"], "ema", "ema")]
)
def test_interop_reads_an_exported_model(run, trained, tmp_path, flag, prefix, stem):
    assert call("export", run, tmp_path / "out", *flag) == 0
    file = tmp_path / f"out/{stem}.safetensors"
    description = read_description(file)
    assert (description.step, description.phase) == (30, 2)
    with torch.device("meta"):
        check_tensors(file, GPT(description.config.model))
    found = read_state(file)
    for name, tensor in found.items():
        assert torch.equal(tensor, trained[1][f"{prefix}/{name}"])


def test_export_takes_the_newest_intact_checkpoint_and_prints_it(run, tmp_path, capsys):
    damage(run, 30)
    assert call("export", run, tmp_path / "out") == 0
    assert read_description(tmp_path / "out/model.safetensors").step == 20
    assert "step_00000030: skipped, damaged or incomplete" in capsys.readouterr().err
    assert call("export", run / "checkpoints/step_00000030", tmp_path / "out") == 2


def test_prune_lists_with_dry_run_and_then_deletes(run, capsys):
    checkpoints = run / "checkpoints"
    assert call("prune", run, "--keep-last", 1, "--dry-run") == 0
    doomed = checkpoints / "step_00000010"
    assert capsys.readouterr().out == f"would delete {doomed}\n"
    assert doomed.is_dir()
    assert call("prune", run, "--keep-last", 1) == 0
    # 20 is the last healthy one.
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [
        "step_00000020",
        "step_00000030",
    ]


def test_prune_deletes_damaged_ones_but_nothing_if_all_are(run, capsys):
    damage(run, 20)
    assert call("prune", run, "--keep-last", 1) == 0
    names = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert names == ["step_00000010", "step_00000030"]
    damage(run, 10)
    damage(run, 30)
    assert call("prune", run, "--keep-last", 1) == 2
    assert "nothing is deleted" in capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize(
    "command", [["ls", "RUN"], ["verify", "RUN"], ["export", "RUN", "out"], ["diff", "RUN", "RUN"]]
)
def test_a_folder_without_checkpoints_is_reported(tmp_path, capsys, command):
    assert call(*(str(tmp_path) if word == "RUN" else word for word in command)) == 2
    assert f"{tmp_path}: holds no checkpoints" in capsys.readouterr().err
