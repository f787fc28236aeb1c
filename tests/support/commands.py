"""Run commands as a user does: real processes, a hard time limit, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.patience import patience, wait_until
from tests.support.tiny import REPOSITORY

TRAIN = (sys.executable, "-m", "jepa_dist.train")
# As documented for one machine.
TORCHRUN = (
    str(Path(sys.executable).with_name("torchrun")),
    *("--rdzv-backend=loopback", "--nproc-per-node=2"),
)

# An environment variable, which children inherit: it tells the processes of a test from others.
TAG = "COMMAND_OF_TEST"
# Time for processes that exit when their parent has exited.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Finished:
    """How a command ended; ``output`` is stdout and stderr together."""

    code: int
    output: str
    seconds: float


class Command:
    """A running command; leaving the ``with`` block ends it and everything it started."""

    def __init__(
        self, command: Sequence[Any], cwd: Path = REPOSITORY, environ: dict[str, Any] | None = None
    ) -> None:
        self._tag = uuid.uuid4().hex
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment({**(environ or {}), TAG: self._tag}),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_hangups,
        )

    def wait(self, timeout: float) -> Finished:
        """Wait for the end, and assert that no process is left.

        Raises:
            AssertionError: it takes longer than ``patience(timeout)``, or leaves a process behind.
        """
        timeout = patience(timeout)
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        seconds = time.monotonic() - self._started
        wait_until(
            lambda: not self.processes(),
            _GRACE_SECONDS,
            lambda: f"{self.processes()} left\n{self.output()}",
        )
        return Finished(code, self.output(), seconds)

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until ``condition`` holds while the command runs."""

        def holds() -> bool:
            assert self._process.poll() is None, f"ended too early:\n{self.output()}"
            return condition()

        wait_until(holds, timeout, self.output)

    def processes(self) -> list[psutil.Process]:
        """Return all processes of this command, including orphans."""
        return tagged_processes(self._tag)

    def process(self) -> psutil.Process | None:
        """Return the command's own process; None once it has ended."""
        return psutil.Process(self._process.pid) if self._process.poll() is None else None

    def rank(self, rank: int) -> psutil.Process:
        """Return the process of a rank that torchrun started."""
        (found,) = [
            process
            for process in psutil.Process(self._process.pid).children()
            if environment_of(process).get("RANK") == str(rank)
        ]
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself."""
        self._process.send_signal(number)

    def output(self) -> str:
        """Return the output so far."""
        # Not through self._output: the command writes at its position, and reading would move it.
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._output.close()


def run_command(
    *command: Any,
    timeout: float = 120,
    cwd: Path = REPOSITORY,
    environ: dict[str, Any] | None = None,
) -> Finished:
    """Run a command to its end."""
    with Command(command, cwd, environ) as running:
        return running.wait(timeout)


def tagged_processes(tag: str) -> list[psutil.Process]:
    """Return all processes whose ``TAG`` is ``tag``, including orphans."""
    return [each for each in psutil.process_iter() if environment_of(each).get(TAG) == tag]


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the addresses at which the processes listen (TCP) or receive (UDP)."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in process.net_connections("inet"):
                if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and each.laddr:
                    found.add(each.laddr.ip)
    return found


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment; empty if it cannot be read (ended, or another user's)."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def command_line_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it cannot be read (ended, or another user's)."""
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _heed_hangups() -> None:
    """Restore SIGHUP: if the tests run under nohup, programs inherit that it is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def environment(changes: dict[str, Any]) -> dict[str, str]:
    """Return our environment without variables that change runs, and without GPUs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JEPA_")}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | fixed | {name: str(value) for name, value in changes.items()}


def compiles_a_kernel(process: psutil.Process) -> bool:
    """Return whether this is a C++ compiler at work on a kernel of Inductor.

    Before them Inductor tries what the processor can do, and takes a failure for a no.
    """
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    is_compiler = bool(words) and words[0].endswith("cc1plus")
    return is_compiler and any(word.endswith(".main.cpp") for word in words)
