"""Run one call in its own process, with limits on time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from jepa_dist.errors import UserError
from tests.support.patience import patience


@dataclass(frozen=True)
class Outcome:
    """How the call ended.

    Args:
        kind: ``ok``, ``refused`` (UserError, or exit code 2), ``traceback`` (any other exception),
            ``timeout`` or ``killed``.
        text: What it printed, the lines of the refusal, or the traceback.
    """

    kind: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def run_limited(call: Callable[[], object], seconds: float = 20, megabytes: int = 512) -> Outcome:
    """Fork, run ``call`` with its memory limited to ``megabytes`` beyond what is in use, and wait.

    ``call`` may return an exit code. It is ended after ``patience(seconds)``.

    Memory is address space: an allocation beyond the limit is a MemoryError, whether or not it
    would be touched.
    """
    seconds = patience(seconds)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(call, writing, seconds, megabytes)
    os.close(writing)
    try:
        return _result(reading, child, seconds)
    finally:
        os.close(reading)


def _result(reading: int, child: int, seconds: float) -> Outcome:
    received = b""
    timed_out = False
    while True:
        # The child ends itself unless it hangs where no signal reaches Python.
        ready, _, _ = select.select([reading], [], [], 2 * seconds)
        if not ready:
            timed_out = True
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reading, 2**16)
        if not piece:
            break
        received += piece
    _, status = os.waitpid(child, 0)
    if timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM):
        return Outcome("timeout", received.decode(errors="replace"))
    if os.WIFSIGNALED(status):
        return Outcome("killed", f"signal {os.WTERMSIG(status)}")
    kind, _, text = received.decode(errors="replace").partition("\n")
    return Outcome(kind, text)


def _in_child(call: Callable[[], object], writing: int, seconds: float, megabytes: int) -> None:
    kind, text = "traceback", ""
    try:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        in_use = psutil.Process().memory_info().vms
        limit = in_use + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        kind, text = _outcome(call)
    except BaseException:
        text = traceback.format_exc()
    finally:
        with contextlib.suppress(OSError):
            os.write(writing, f"{kind}\n{text}"[:60_000].encode(errors="backslashreplace"))
        os._exit(0)


def _outcome(call: Callable[[], object]) -> tuple[str, str]:
    # A terminal's encoding: unprintable characters are an error here, too.
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = call()
    except UserError as error:
        return "refused", "\n".join(error.problems)
    except SystemExit as exit_:
        code = exit_.code
    except Exception:
        return "traceback", traceback.format_exc()
    return ("refused" if code == 2 else "ok"), _text(printed)


def _text(printed: io.TextIOWrapper) -> str:
    printed.flush()
    buffer = printed.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()
