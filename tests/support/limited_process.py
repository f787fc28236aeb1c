"""Run a function on one hostile input, in a process with limits on time and memory."""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import resource
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from jepa_dist.errors import UserError
from tests.support.patience import patience

_context = mp.get_context("forkserver")
_MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """How the call ended."""

    code: int
    """0; 2 for a user error; 1 for a traceback."""
    output: str
    """Standard error, or the text of the error."""


def run_limited(
    fn: Callable[..., Any], *args: Any, seconds: float = 20, memory_mib: int = 512
) -> Outcome:
    """Call ``fn(*args)``, which may return an exit code.

    Raises:
        AssertionError: it takes longer than ``patience(seconds)``, or the process dies.
    """
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(theirs, memory_mib, fn, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(patience(seconds)), f"still running after {patience(seconds)} s"
        return ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _run(pipe: Connection, memory_mib: int, fn: Callable[..., Any], args: tuple) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + memory_mib * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            code = fn(*args) or 0
    except UserError as error:
        pipe.send(Outcome(error.exit_code, "\n".join(error.problems)))
    except BaseException:
        pipe.send(Outcome(1, traceback.format_exc()))
    else:
        pipe.send(Outcome(int(code) if isinstance(code, int) else 0, errors.getvalue()))
