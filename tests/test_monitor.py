"""Compile counting, rolling digest, step timer, run directory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from jepa_dist.errors import UserError
from jepa_dist.monitor.compiles import CompileCounter
from jepa_dist.monitor.hardware import peak_flops
from jepa_dist.monitor.history import RunHistory, young_interval
from jepa_dist.monitor.run_dir import write_run_dir
from jepa_dist.monitor.step_timer import TRAINING_PHASES, RollingDigest, StepTimer
from jepa_dist.monitor.writer import MetricsWriter


def test_recompiles_are_unexpected_graphs() -> None:
    counter = CompileCounter()
    counter.observe(5, {"train"})
    counter.observe(5, {"train"})
    counter.observe(6, {"train", "jepa"})
    counter.observe(11, {"train", "jepa", "evaluate"})
    assert counter.recompiles == 0
    counter.observe(13, {"train"})
    assert counter.recompiles == 2


def test_the_digest_sees_every_step_in_order() -> None:
    def digest(*sums: int) -> str:
        rolling = RollingDigest()
        for value in sums:
            rolling.update(value.to_bytes(8, "little"))
        return rolling.hex()

    assert digest(1, 2, 3) == digest(1, 2, 3)
    assert len({digest(1, 2, 3), digest(1, 3, 2), digest(1, 2), digest(0, 1, 2, 3)}) == 4


@pytest.fixture
def exact_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the clock: time passes only in ``time.sleep``, exactly as requested."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.usefixtures("exact_sleep")
def test_evaluation_is_not_training_time() -> None:
    meter = StepTimer(1000, torch.device("cpu"))
    for step in range(4):
        meter.step(step)
    with meter.phase("data_wait"):
        time.sleep(0.04)
    with meter.phase("evaluation"):
        time.sleep(0.5)
    lap = meter.lap()
    parts = ("data_wait", "forward", "backward", "optimizer", "evaluation", "other")
    whole = sum(lap[f"time/{part}"] for part in parts)
    assert whole == pytest.approx(lap["time/step"] + lap["time/evaluation"], abs=1e-3)
    assert 4 * lap["time/step"] == pytest.approx(0.04)
    assert lap["tokens_per_second"] == pytest.approx(1000 / lap["time/step"])
    assert lap["time/data_wait"] <= lap["time/step"]
    assert meter.summary()["seconds"] == pytest.approx(0.54)


@pytest.mark.usefixtures("exact_sleep")
def test_communication_is_timed_apart_from_the_pass_that_waits_for_it() -> None:
    meter = StepTimer(1000, torch.device("cpu"))
    meter.step(0, times_communication=True)
    with meter.phase("forward"):
        time.sleep(0.05)
        with meter.communication():
            assert meter.place.phase == "communication"
            time.sleep(0.15)
        assert meter.place.phase == "forward"
    with meter.phase("evaluation"), meter.communication():
        assert meter.place.phase == "evaluation"
        time.sleep(0.1)
    lap = meter.lap()
    times = [lap[f"time/{part}"] for part in ("forward", "communication", "evaluation")]
    assert times == pytest.approx([0.05, 0.15, 0.1])
    assert lap["time/step"] == pytest.approx(
        sum(lap[f"time/{part}"] for part in (*TRAINING_PHASES, "other")), abs=1e-3
    )


@pytest.mark.usefixtures("exact_sleep")
def test_communication_is_extrapolated_from_timed_steps() -> None:
    """Measured in one step of three: 0.1 s of each step's 0.15 s."""
    meter = StepTimer(1000, torch.device("cpu"))
    for step in range(3):
        meter.step(step, times_communication=step == 2)
        with meter.phase("backward"):
            time.sleep(0.05)
            with meter.communication():
                assert meter.place.phase == ("communication" if step == 2 else "backward")
                time.sleep(0.1)
    lap = meter.lap()
    assert lap["time/communication"] == pytest.approx(0.1, rel=0.3)
    assert lap["time/backward"] + lap["time/communication"] == pytest.approx(0.15, rel=0.3)
    meter.step(3)
    with meter.phase("backward"), meter.communication():
        time.sleep(0.01)
    lap = meter.lap()
    assert lap["time/communication"] == 0
    assert lap["time/backward"] >= 0.01


@pytest.mark.usefixtures("exact_sleep")
def test_slowdown_while_a_checkpoint_is_written() -> None:
    meter = StepTimer(1000, torch.device("cpu"))
    for step in range(6):
        meter.step(step, saving=step >= 3)
        time.sleep(0.05 if step < 3 else 0.1)
    assert meter.lap()["checkpoint/slowdown"] == pytest.approx(2.0)
    meter.step(6)
    time.sleep(0.1)
    assert "checkpoint/slowdown" not in meter.lap()


def test_places_count_phases() -> None:
    meter = StepTimer(1000, torch.device("cpu"))
    meter.step(7)
    with meter.phase("forward"):
        inside = meter.place
    meter.still_alive()
    assert (inside.step, inside.phase) == (7, "forward")
    assert meter.place.count == inside.count + 1


def test_goodput_spans_all_starts(tmp_path: Path) -> None:
    first = RunHistory(tmp_path, 0, 2, None)
    assert first.record(0.0, 1.0)["goodput/failures"] == 0
    assert "checkpoint/young_interval_seconds" not in first.record(0.0, 1.0)
    starts = tmp_path / "starts.jsonl"
    began = json.loads(starts.read_text())
    # As if the run had begun 1000 s ago; and a line that a crash cut short.
    starts.write_text(json.dumps({**began, "time": began["time"] - 1000}) + '\n{"time": 17')
    starts.write_text(starts.read_text() + "\n")
    assert RunHistory(tmp_path, 5, 2, "stopped").failures == 0
    again = RunHistory(tmp_path, 5, 1, "running").record(600.0, 2.0)
    assert again["goodput/productive_share"] == pytest.approx(0.6, rel=0.01)
    assert again["goodput/wall_seconds"] == pytest.approx(1000, rel=0.01)
    assert (again["goodput/starts"], again["goodput/failures"]) == (3, 1)
    expected = young_interval(2.0, 1000)
    assert again["checkpoint/young_interval_seconds"] == pytest.approx(expected, rel=0.01)
    assert young_interval(2.0, 900) == pytest.approx(60)


def test_a_clock_set_back_leaves_a_share(tmp_path: Path) -> None:
    RunHistory(tmp_path, 0, 1, None)
    starts = tmp_path / "starts.jsonl"
    began = json.loads(starts.read_text())
    starts.write_text(json.dumps({**began, "time": began["time"] + 86_400}) + "\n")
    share = RunHistory(tmp_path, 5, 1, "stopped").record(10.0, None)["goodput/productive_share"]
    assert share == 1.0


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835.5e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some other device") is None


def test_run_directory(tmp_path: Path) -> None:
    write_run_dir(tmp_path / "run", {"config.yaml": "seed: 1\n"})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_run_dir(tmp_path / "file" / "run", {})


def test_records_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    whole = "".join(lines) + json.dumps({"step": 2, "final": True}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "lo')
    writer = MetricsWriter(tmp_path, step=2)
    writer.write({"step": 3, "loss": 2.0})
    writer.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in kept] == [(1, 1.0), (2, 1.0), (3, 2.0)]
