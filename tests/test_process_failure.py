"""A rank ends when a thread of it fails, with the thread's error."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from jepa_dist.errors import UserError
from jepa_dist.monitor.watchdog import Watchdog
from jepa_dist.process import failure
from jepa_dist.process.failure import exit_on_rank_error


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record exit codes; an exit ends only the thread here."""
    codes: list[int] = []

    def leave(code: int) -> NoReturn:
        codes.append(code)
        sys.exit(code)

    monkeypatch.setattr(failure, "_exit_now", leave)
    return codes


def run_thread(target: Callable[[], Any]) -> None:
    thread = threading.Thread(target=target)
    thread.start()
    thread.join(20)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("a deliberate failure"), 1, "RuntimeError: a deliberate failure"),
        (UserError("x: is wrong"), 2, "[rank 3] error: x: is wrong"),
    ],
)
def test_an_error_in_the_watchdog_ends_the_rank(
    tmp_path: Path,
    exits: list[int],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail() -> None:
        raise error

    noted: list[str] = []
    with (
        exit_on_rank_error(3, on_failure=noted.append),
        Watchdog(tmp_path, 3, 4, lambda: None, 60, look=fail) as watchdog,  # type: ignore[arg-type]
    ):
        watchdog._thread.join(20)
    assert exits == [code]
    assert noted == [str(error)]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("x: is wrong"), r"x: is wrong"),
        (ValueError("bad"), r"Traceback[\s\S]+in fail\n[\s\S]+ValueError: bad\n"),
    ],
)
def test_torchrun_shows_a_traceback_unless_the_user_can_fix_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exits: list[int],
    error: Exception,
    shown: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit), exit_on_rank_error(0):
        fail()
    info = ProcessFailure(0, 1, exits[0], str(tmp_path / "error.json")).message["extraInfo"]
    assert re.fullmatch(shown, info["py_callstack"])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    with pytest.raises(SystemExit), exit_on_rank_error(0):
        fail()
    assert exits[0] == exits[1]


READ_ERROR = (
    "[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:2218: Connection reset by peer. "
    "This is typically caused by a remote worker hanging"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("can't start new thread"), "limit of processes and threads (ulimit -u"),
        (OSError(24, "Too many open files", "/x"), "limit of open files (ulimit -n) is reached"),
        (MemoryError(), "out of memory: the limit of memory"),
        (
            RuntimeError("g++: fatal error: Killed signal terminated program cc1plus"),
            "the C++ compiler was killed, most likely because the host's memory was used up",
        ),
        (RuntimeError(READ_ERROR), "2218: Connection reset by peer; traceback: RUN/logs)"),
    ],
)
def test_limits_and_lost_ranks_are_reported_in_one_line(
    exits: list[int],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    with pytest.raises(SystemExit), exit_on_rank_error(3):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[rank 3] error: ")
    assert message in line
    assert exits == [1]


def test_an_allocation_that_failed_without_an_exception(
    exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """CPython's SystemError is out of memory if memory is limited, and a bug otherwise."""

    def printed() -> str:
        with pytest.raises(SystemExit), exit_on_rank_error(3):
            raise SystemError("error return without exception set")
        return capsys.readouterr().err

    assert "Traceback" in printed()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**50, hard))  # more than there is
    try:
        line = printed()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert line.startswith("[rank 3] error: out of memory: the limit of memory (ulimit -v")
    assert line.count("\n") == 1
    assert exits == [1, 1]


class CppCompileError(RuntimeError):
    """Recognized by its name, like Inductor's."""


@pytest.mark.parametrize(
    ("returncode", "found"),
    [(-2, signal.SIGINT), (-9, signal.SIGKILL), (-11, None), (-40, None), (1, None)],
)
def test_what_ended_the_compiler(returncode: int, found: signal.Signals | None) -> None:
    ended = subprocess.CalledProcessError(returncode, ["g++"])
    assert failure.killed_compiler(ended) is None  # some other program
    error = CppCompileError("C++ compile error")
    error.__cause__ = ended
    outer = RuntimeError("CppCompileError: C++ compile error")
    outer.__context__ = error
    assert failure.killed_compiler(outer) is found


def test_a_failure_is_noted_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    noted: list[str] = []
    failure.call_with_limit(noted.append, "why")
    assert noted == ["why"]


def test_errors_in_threads_of_libraries_do_not(exits: list[int]) -> None:
    seen: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda ended: seen.append(str(ended.exc_value))
    try:
        with exit_on_rank_error(0):
            run_thread(lambda: int("x"))
    finally:
        threading.excepthook = before
    assert exits == []
    assert seen == ["invalid literal for int() with base 10: 'x'"]


def test_the_hook_is_removed(exits: list[int]) -> None:
    before = threading.excepthook
    with exit_on_rank_error(0):
        assert threading.excepthook is not before
    assert threading.excepthook is before
