"""Errors from limits of Python and the system end every command in one line, exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_dist.checkpoint.__main__ import main as checkpoint
from jepa_dist.command_line import errors_in_one_line
from jepa_dist.errors import UserError
from jepa_dist.interop.parameter_golf import main as parameter_golf
from jepa_dist.process.failure import exit_on_host_error, exit_on_rank_error, exit_on_user_error
from jepa_dist.report.__main__ import main as report
from tests.support.patience import patience


def overflow() -> None:
    (2**70).to_bytes(4, "little")


def recursion() -> None:
    recursion()


def memory() -> None:
    raise MemoryError


def long_name() -> None:
    os.stat("x" * 5000)


RAISED: dict[str, tuple[Callable[[], None], str]] = {
    "overflow": (overflow, "OverflowError"),
    "recursion": (recursion, "nested too deeply"),
    "memory": (memory, "not enough memory"),
    "long name": (long_name, os.strerror(errno.ENAMETOOLONG)),
}


@pytest.mark.parametrize("name", RAISED)
def test_limits_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    call, word = RAISED[name]
    with pytest.raises(UserError) as caught, errors_in_one_line():
        call()
    (problem,) = caught.value.problems
    assert word in problem
    assert len(problem) < 500
    for guard in (exit_on_host_error, lambda: exit_on_user_error(0)):
        with pytest.raises(SystemExit) as left, guard():
            call()
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_a_rank_that_fails_alone_prints_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_user_error(3):
        memory()
    assert capsys.readouterr().err.startswith("[rank 3] error: there is not enough memory")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (checkpoint, ["verify", LONG]),
        (checkpoint, ["export", LONG, "out"]),
        (checkpoint, ["prune", LONG, "--keep-last", "1"]),
        (report, [LONG]),
        (report, ["a/" * 3000]),
        (parameter_golf, ["export", LONG, "--out", "x"]),
    ],
)
def test_names_that_are_too_long(
    main: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


class _LeftError(BaseException):
    """Raised instead of exiting."""


@pytest.mark.parametrize("reason", ["file too short", "invalid ELF header"])
def test_an_incomplete_library_is_named(
    tmp_path: Path,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "ab" / "main.so"

    def leave(code: int) -> None:
        raise _LeftError(code)

    monkeypatch.setattr("jepa_dist.process.failure._exit_now", leave)
    with pytest.raises(_LeftError) as left, exit_on_rank_error(0):
        raise RuntimeError("backend='inductor' raised") from OSError(f"{file}: {reason}")
    assert left.value.args == (2,)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: incomplete library ({reason})" in line
    assert "TORCHINDUCTOR_CACHE_DIR" in line


def test_a_hanging_failure_note_does_not_delay_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa_dist.process.failure._NOTE_SECONDS", 0.05)
    released = threading.Event()

    def hang(reason: str) -> None:
        released.wait(60)

    def leave(code: int) -> None:
        raise _LeftError(code)

    monkeypatch.setattr("jepa_dist.process.failure._exit_now", leave)
    with pytest.raises(_LeftError), exit_on_rank_error(0, on_failure=hang):
        raise UserError("x")
    released.set()


@pytest.mark.parametrize(
    "command",
    ["sweep list objectives_debug", pytest.param("checkpoint ls RUN", marks=pytest.mark.slow)],
)
def test_a_closed_pipe_ends_a_command_quietly(command: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    words = command.replace("RUN", str(tmp_path)).split()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "jepa_dist", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=patience(60),
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
