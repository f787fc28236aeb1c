"""The watchdog names stuck ranks and dumps stacks; a collective's time limit ends a hung rank."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from jepa_dist.monitor.step_timer import Place
from jepa_dist.monitor.watchdog import Heartbeat, Watchdog, diagnose, read_heartbeats
from tests.support.commands import Command
from tests.support.tiny import write_corpus
from tests.support.train_command import UNDER_TORCHRUN, has_logged, settings


def beats(**changes: dict[str, object]) -> dict[int, Heartbeat]:
    """Return heartbeats of three ranks at the same place, with changes by ``rank_<r>``."""
    usual = Heartbeat(beat=1, count=40, step=12, phase="forward", seconds=61.0, host="n", pid=1)
    return {r: replace(usual, **changes.get(f"rank_{r}", {})) for r in range(3)}


def later(before: dict[int, Heartbeat], *stopped: int) -> dict[int, Heartbeat]:
    """Return the same heartbeats three beats later, except for stopped ranks."""
    return {r: b if r in stopped else replace(b, beat=b.beat + 3) for r, b in before.items()}


def test_the_rank_that_is_behind() -> None:
    before = beats(rank_1={"count": 39, "phase": "data_wait", "host": "n7", "pid": 5})
    assert diagnose(before, later(before), 3) == [
        "rank 1 (host n7, pid 5) is behind, at step 12 in data_wait for 61 s"
    ]


def test_the_rank_that_is_stopped_or_dead() -> None:
    before = beats(rank_2={"step": 11, "phase": "backward"})
    assert diagnose(before, later(before, 2), 3) == [
        "rank 2 (host n, pid 1) sends no heartbeat, last seen at step 11 in backward"
    ]


def test_a_rank_that_never_started() -> None:
    before = {r: beat for r, beat in beats().items() if r != 1}
    assert diagnose(before, later(before), 3) == ["rank 1 has left no heartbeat"]


def test_all_ranks_wait() -> None:
    assert diagnose(beats(), later(beats()), 3) == ["all ranks are at step 12 in forward"]


def test_heartbeats_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(1, 2, "forward")
    watchdog = Watchdog(tmp_path, 0, 1, lambda: place, late_seconds=60)
    folder = tmp_path / "heartbeats"
    for _ in range(2):
        folder.write_text("a file")
        for _ in range(2):
            watchdog._tick()
        message = f"warning: heartbeats cannot be written (File exists: {folder})"
        assert capsys.readouterr().err.count(message) == 1
        folder.unlink()
        watchdog._tick()
        assert read_heartbeats(folder, 1)[0].step == 2
        (folder / "rank_0.json").unlink()
        folder.rmdir()


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ended_by_the_time_limit(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run_dir = tmp_path / "run"
    limits = ("parallel.timeout_seconds=15", "monitor.late_seconds=2")
    endless = [*settings(tmp_path, run__dir=run_dir, train__steps=10**6), *limits]
    with Command([*UNDER_TORCHRUN, *endless]) as job:
        job.wait_for(lambda: has_logged(run_dir), 120)
        victim = job.rank(1)
        victim.send_signal(signal.SIGSTOP)
        finished = job.wait(180)  # torchrun grants a stopped rank 30 s before it kills it
    assert finished.code != 0
    assert f"pid {victim.pid}) sends no heartbeat, last seen at step" in finished.output
    stacks = (run_dir / "logs" / "rank_0.log").read_text()
    assert "Current thread" in stacks
    assert "training/loop.py" in stacks
    assert '"state": "failed"' in (run_dir / "status.json").read_text()
