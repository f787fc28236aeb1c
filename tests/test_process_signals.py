"""Stop signals: duplicates, immediate exits, and the effect on the launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.resource_tracker import ResourceTracker
from pathlib import Path

import pytest

from jepa_dist.data import workers
from tests.support.commands import TRAIN, Command, Finished, compiles_a_kernel
from tests.support.tiny import tiny_overrides, write_corpus

PROGRAM = """
import time
from jepa_dist.process.signals import StopRequest

request = StopRequest(grace_seconds=60)
print("ready", flush=True)
while request.received is None:
    time.sleep(0.01)
print(f"received {request.received.name}", flush=True)
time.sleep(50)
"""

SLOW_TO_STOP = """
import time
from jepa_dist.process.signals import StopRequest

StopRequest(0.1, on_give_up=lambda reason: print(f"noted: {reason}", flush=True))
print("ready", flush=True)
time.sleep(50)
"""

LAUNCHER = """
import os
import subprocess
import sys
import time

RANK = '''
import time
from jepa_dist.process.dist_env import die_with_parent
from jepa_dist.process.signals import StopRequest

die_with_parent()
request = StopRequest(grace_seconds=60)
print("ready", flush=True)
while request.received is None:
    time.sleep(0.01)
print("saving", flush=True)
time.sleep(1)
print("saved", flush=True)
'''
child = subprocess.Popen([sys.executable, "-c", RANK])
time.sleep(50)
"""


def test_duplicate_signals_are_one_request_and_a_later_sigint_exits() -> None:
    with Command([sys.executable, "-c", PROGRAM]) as process:
        process.wait_for(lambda: "ready" in process.output(), 60)
        # As SLURM sends to every process of the step, and torchrun to its ranks. (Only one of
        # several equal pending signals arrives.)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM):
            process.signal(number)
        process.wait_for(lambda: "received SIG" in process.output(), 30)
        time.sleep(2.5)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM) * 5:
            process.signal(number)
            time.sleep(0.02)
        process.signal(signal.SIGINT)
        assert process.wait(30).code == 128 + signal.SIGINT


def test_what_nohup_ignores_is_not_a_request() -> None:
    with Command(["nohup", sys.executable, "-c", PROGRAM]) as process:
        process.wait_for(lambda: "ready" in process.output(), 60)
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)
        process.wait_for(lambda: "received" in process.output(), 30)
        assert "received SIGTERM" in process.output()


def test_a_rank_that_does_not_stop_in_time_prints_it_and_exits() -> None:
    with Command([sys.executable, "-c", SLOW_TO_STOP]) as process:
        process.wait_for(lambda: "ready" in process.output(), 60)
        process.signal(signal.SIGTERM)
        finished = process.wait(30)
    assert finished.code == 4
    assert "noted: not stopped 0.1 s after SIGTERM: leaving without" in finished.output


@pytest.mark.parametrize("asked", [True, False], ids=["asked to stop", "not asked"])
def test_a_rank_ends_with_its_launcher_unless_it_saves(asked: bool) -> None:
    finished = _end_launcher(asked=asked)
    assert finished.code == -signal.SIGKILL
    assert ("saved" in finished.output) == asked


def _end_launcher(*, asked: bool) -> Finished:
    with Command([sys.executable, "-c", LAUNCHER]) as launcher:
        launcher.wait_for(lambda: "ready" in launcher.output(), 60)
        process = launcher.process()
        assert process is not None
        if asked:
            (rank,) = process.children()
            rank.send_signal(signal.SIGTERM)
            launcher.wait_for(lambda: "saving" in launcher.output(), 30)
        launcher.signal(signal.SIGKILL)
        return launcher.wait(30)  # which sees that no process is left


def test_the_resource_tracker_survives_a_stop_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the process group that a terminal or SLURM signals."""
    tracker = ResourceTracker()
    monkeypatch.setattr(workers, "resource_tracker", tracker)
    with workers.signals_left_to_parent():
        pass
    try:
        blocked = _blocked_signals(tracker._pid)  # type: ignore[attr-defined]
    finally:
        os.close(tracker._fd)  # type: ignore[attr-defined]
        os.waitpid(tracker._pid, 0)  # type: ignore[attr-defined]
    assert {signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2} <= blocked


def _blocked_signals(process: int) -> set[int]:
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:")]
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


@pytest.mark.slow
@pytest.mark.parametrize("warms_up", [True, False])
def test_ctrl_c_while_the_compiler_works(tmp_path: Path, warms_up: bool) -> None:
    """A terminal sends SIGINT to all of its processes: the compiler ends, too."""
    write_corpus(tmp_path)
    compiles = {"parallel__compile": True, "parallel__compile_warmup": warms_up}
    environ = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    config = tmp_path / "config.yaml"
    config.touch()
    command = [*TRAIN, config, *tiny_overrides(tmp_path, **compiles)]
    with Command(command, environ=environ) as run:
        run.wait_for(lambda: any(map(compiles_a_kernel, run.processes())), 120)
        main = run.process()
        assert main is not None
        os.killpg(main.pid, signal.SIGINT)
        done = run.wait(60)
    assert "Traceback" not in done.output
    last = done.output.splitlines()[-1]
    if warms_up:
        assert done.code == 0, done.output
        assert "asked to stop before the first step; the same command resumes the run" in last
    else:
        assert done.code == 128 + signal.SIGINT, done.output
        assert last.endswith("error: stopped while it compiled (SIGINT); the same command resumes")
