"""Traces of single steps, and errors on out-of-memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from jepa_dist.config import ProfileConfig, load
from jepa_dist.errors import UserError
from jepa_dist.monitor.device_memory import explain_out_of_memory
from jepa_dist.monitor.profiler import StepProfiler
from tests.support.commands import TORCHRUN, TRAIN, run_command
from tests.support.tiny import REPOSITORY, tiny_overrides, write_corpus


def profiled(folder: Path, config: ProfileConfig, steps: int, rank: int = 0) -> list[str]:
    messages: list[str] = []
    with StepProfiler(config, folder, rank, messages.append) as profiler:
        for step in range(steps):
            profiler.step()
            with torch.profiler.record_function(f"step_{step}"):
                torch.ones(8) @ torch.ones(8)
    return messages


def names(folder: Path, rank: int = 0) -> set[str]:
    with gzip.open(folder / "profile" / f"rank_{rank}.json.gz", "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    (message,) = profiled(tmp_path, ProfileConfig(start=2, steps=2), steps=6)
    assert "profile of 2 steps" in message
    seen = names(tmp_path)
    assert {"step_2", "step_3", "aten::dot"} <= seen
    assert not {"step_1", "step_4"} & seen
    assert "aten::dot" in (tmp_path / "profile" / "rank_0.txt").read_text()


def test_a_run_that_ends_early_writes_a_partial_trace(tmp_path: Path) -> None:
    profiled(tmp_path, ProfileConfig(start=1, steps=50), steps=3)
    assert {"step_1", "step_2"} <= names(tmp_path)


@pytest.mark.parametrize(
    "config", [ProfileConfig(), ProfileConfig(steps=2, start=0, ranks=[1]), ProfileConfig(steps=2)]
)
def test_nothing_is_written_by_default(tmp_path: Path, config: ProfileConfig) -> None:
    assert profiled(tmp_path, config, steps=4) == []
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file in place of the folder")
    (message,) = profiled(tmp_path, ProfileConfig(start=0, steps=1), steps=2)
    assert message.startswith("warning: the profile cannot be written")


@pytest.mark.parametrize(
    "text",
    [
        "monitor.profile={start: 3, steps: 2, ranks: [0, 1]}",
        "monitor={profile: {start: 3, steps: 2, ranks: [0, 1]}}",
    ],
)
def test_settings_may_be_given_as_a_mapping(text: str) -> None:
    profile = load(None, [text], {}).config.monitor.profile
    assert (profile.start, profile.steps, profile.ranks) == (3, 2, [0, 1])
    assert load(None, [text, "monitor.profile.steps=0"], {}).config.monitor.profile.start == 3
    assert load(None, ["monitor.profile=null"], {}).config.monitor.profile == ProfileConfig()


def test_errors_in_a_mapping_are_named() -> None:
    with pytest.raises(UserError, match=r"monitor\.profile\.stpes.*did you mean"):
        load(None, ["monitor.profile={stpes: 2}"], {})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_of_a_real_run_are_traced(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("monitor: {profile: {start: 3, steps: 2, ranks: [0, 1]}}\n")
    settings = tiny_overrides(tmp_path, train__steps=7)
    train = (*TORCHRUN, "-m", "jepa_dist.train", config, *settings)
    done = run_command(*train, timeout=280)
    assert done.code == 0, done.output
    for rank in (0, 1):
        seen = names(tmp_path / "run", rank)
        assert {"data_wait", "forward", "backward", "optimizer"} <= seen
        assert any("all_gather" in name for name in seen)


def test_out_of_memory_gives_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, explain_out_of_memory(tmp_path, 0, snapshot=True):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
    text = "\n".join(caught.value.problems)
    assert "Tried to allocate 20 GiB" in text
    assert "batch.micro" in text
    assert "parallel.activation_checkpointing" in text


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), explain_out_of_memory(tmp_path, 0, snapshot=False):
        raise KeyError("x")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_without_memory_ends_with_advice(tmp_path: Path) -> None:
    """The real command, with an optimizer that raises an out-of-memory error."""
    write_corpus(tmp_path)
    (tmp_path / "config.yaml").touch()
    script = tmp_path / "starved.py"
    script.write_text(
        "import torch\n"
        "from jepa_dist.optim.optimizer import Optimizer\n"
        "from jepa_dist.train import main\n"
        "def step(self, skip=None):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')\n"
        "Optimizer.step = step\n"
        "main()\n"
    )
    command = (TRAIN[0], script, tmp_path / "config.yaml", *tiny_overrides(tmp_path))
    done = run_command(*command, timeout=200, environ={"PYTHONPATH": REPOSITORY})
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    assert "error: out of device memory: CUDA out of memory. Tried to allocate 20" in done.output
    assert "lower batch.micro" in done.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "out of device memory" in status["reason"]


@pytest.mark.gpu
def test_a_snapshot_is_written_when_memory_runs_out(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="memory_viz"),
        explain_out_of_memory(tmp_path, 3, snapshot=True),
    ):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "profile" / "memory_rank_3.pickle").stat().st_size > 0
