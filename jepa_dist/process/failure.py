"""Exit a rank after an error: immediately, with a clear message and the right exit code.

Errors that all ranks raise (configuration, data, run directory) are printed once, by rank 0. An
error on one rank is printed by that rank, which then exits without waiting for the others: torchrun
notices and terminates them ("Early, clear errors on every rank" in docs/architecture.md).
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import format_exception
from typing import NoReturn

from jepa_dist.command_line import UNFORESEEN, errors_in_one_line
from jepa_dist.errors import SharedError, UserError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + 2

# Ranks other than 0 exit this much later; otherwise torchrun could terminate rank 0 before it has
# printed the error.
_LET_MAIN_SPEAK_SECONDS = 2.0
# Longest wait for recording a failure: the file system itself may hang.
_NOTE_SECONDS = 5.0

# The dynamic loader's messages for a truncated file in the compiler's cache.
_BROKEN_LIBRARY = re.compile(
    r"(/[^:\n]+\.so): (?:file too short|invalid ELF header|cannot read file data|"
    r"ELF file data encoding|object file has no|failed to map segment|ELF load command)"
)

# Messages of gcc and clang about a process of theirs.
_KILLED_COMPILER = re.compile("Killed signal terminated program|unable to execute command: Killed")

# Signals that end a compiler from outside; others are failures of the compiler.
_ENDS_COMPILER = {
    int(number): number
    for number in (
        *(signal.SIGKILL, signal.SIGINT, signal.SIGTERM),
        *(signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1),
    )
}

# In the messages of gloo's errors, which have no separate class.
_GLOO = "/gloo/transport/"

# CPython's message if its own code, or an extension's, fails without an exception.
_NO_EXCEPTION = "error return without exception set"

# Limits of the system, by the message of the error when one is reached.
_THREADS = "the limit of processes and threads (ulimit -u, or the container's), or of memory"
_FILES = "the limit of open files (ulimit -n)"
_MEMORY = "the limit of memory (ulimit -v, the container's or the host's)"
_LIMITS = {
    "can't start new thread": _THREADS,
    "Resource temporarily unavailable": _THREADS,
    "Too many open files": _FILES,
    "Cannot allocate memory": _MEMORY,
    "can't allocate memory": _MEMORY,
    "std::bad_alloc": _MEMORY,
}

_PACKAGE = str(Path(__file__).parent.parent) + os.sep

log = logging.getLogger(__name__)


@contextmanager
def exit_on_host_error() -> Iterator[None]:
    """Exit on a ``UserError`` raised before the process group exists.

    The first rank of each host prints the problems of its own command, files and environment; the
    host's other ranks exit silently with the same code.
    """
    try:
        with errors_in_one_line():
            yield
    except UserError as error:
        _exit_per_host(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _exit_per_host(error: UserError) -> NoReturn:
    # The environment itself may be wrong: without a valid local rank, this process prints.
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if local_rank == "0" or not local_rank.isdecimal():
        _print_problems(error, prefix="" if rank in ("0", "") else f"[rank {rank}] ")
    else:
        time.sleep(_LET_MAIN_SPEAK_SECONDS)
    sys.exit(error.exit_code)


@contextmanager
def exit_on_user_error(rank: int, on_failure: Callable[[], None] | None = None) -> Iterator[None]:
    """Exit on a ``UserError`` that every rank raises: rank 0 prints it, all exit with its code.

    Args:
        rank: This process's rank.
        on_failure: Called before the error is printed.
    """
    try:
        with errors_in_one_line():
            yield
    except UserError as error:
        if on_failure is not None:
            on_failure()
        if isinstance(error.__cause__, UNFORESEEN) and rank != 0:  # possibly on this rank only
            _print_problems(error, prefix=f"[rank {rank}] ")
        _exit_together(error, rank)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _exit_together(error: UserError, rank: int) -> NoReturn:
    if rank == 0:
        _print_problems(error, prefix="")
    else:
        time.sleep(_LET_MAIN_SPEAK_SECONDS)
    if _has_process_group():
        # With an open process group, the interpreter's normal exit occasionally aborts.
        _exit_now(error.exit_code)
    sys.exit(error.exit_code)


@contextmanager
def exit_on_rank_error(
    rank: int, on_failure: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Exit immediately on an error that may be raised on this rank only, skipping all clean-up.

    Clean-up would deadlock: it waits for ranks that wait for this one. An error that ends a thread
    of this package (e.g. the watchdog) ends the rank, too: it would continue without it.

    Args:
        rank: This process's rank.
        on_failure: Called before the error is printed, with one line that describes it.
    """
    try:
        with _watching_threads(rank, on_failure), _call_on_failure(on_failure):
            yield
    except SharedError as error:
        log.error("%s", error)
        _exit_together(error, rank)
    except KeyboardInterrupt:
        print(f"[rank {rank}] interrupted", file=sys.stderr)
        _exit_now(EXIT_INTERRUPTED)
    except Exception as error:
        _exit_alone(error, rank)


def _exit_alone(error: Exception, rank: int) -> NoReturn:
    """Print an error that only this rank has raised, and exit.

    Its traceback is printed unless one line says what to do; the log has it in any case.
    """
    if isinstance(error, UserError):
        log.error("%s", error)
        known: UserError | None = error
    else:
        log.error("failed", exc_info=error)
        known = (
            _broken_library(error)
            or _compiler_problem(error)
            or _reached_limit(error)
            or _broken_collective(error)
        )
    _record_for_torchrun(known or error)
    if known is not None:
        _print_problems(known, prefix=f"[rank {rank}] ")
        _exit_now(known.exit_code)
    print(f"[rank {rank}] failed:", file=sys.stderr)
    traceback.print_exception(error)
    _exit_now(EXIT_FAILURE)


@contextmanager
def _watching_threads(rank: int, on_failure: Callable[[str], None] | None) -> Iterator[None]:
    """Exit if an error ends a thread that runs code of this package."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        error = ended.exc_value
        if not isinstance(error, Exception) or not _is_ours(error):
            before(ended)
            return
        _note(error, on_failure)
        _exit_alone(error, rank)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _is_ours(error: Exception) -> bool:
    """Return whether the error went through code of this package."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.startswith(_PACKAGE) for frame, _ in frames)


@contextmanager
def _call_on_failure(on_failure: Callable[[str], None] | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _note(error, on_failure)
        raise


def _note(error: BaseException, on_failure: Callable[[str], None] | None) -> None:
    if on_failure is not None:
        # The error being raised matters more than a failure to record it.
        reason = str(error).partition("\n")[0] or type(error).__name__
        call_with_limit(on_failure, reason)


def call_with_limit(note: Callable[[str], None], reason: str) -> None:
    """Call ``note`` in a thread and wait a few seconds at most, in case the file system hangs.

    If no thread can be started, it is called directly.
    """

    def call() -> None:
        with suppress(Exception):
            note(reason)

    thread = threading.Thread(target=call, name="note", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        call()
    else:
        thread.join(_NOTE_SECONDS)


class _ExplainedError(UserError):
    """A failure while training that one line explains; not an error of the user's input."""

    def __init__(self, problem: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


def _broken_library(error: BaseException) -> UserError | None:
    """Return an error that names the truncated compiled library, if one caused ``error``.

    A process that is killed while it compiles may leave one in the cache of compiled graphs, and
    every later start loads it.
    """
    for text in _texts(error):
        if found := _BROKEN_LIBRARY.search(text):
            folder = os.path.dirname(found[1])
            return UserError(
                f"{found[1]}: incomplete library ({found[0].rpartition(': ')[2]}): a process was "
                "killed while it compiled, or the disk was full; delete this file's folder "
                f"({folder}) or all of the compiler's cache (TORCHINDUCTOR_CACHE_DIR)"
            )
    return None


def killed_compiler(error: BaseException) -> signal.Signals | None:
    """Return the signal that ended the C++ compiler, SIGKILL or one that asks to stop, if that
    caused ``error``."""
    causes = list(_causes(error))
    if any(_KILLED_COMPILER.search(str(each)) for each in causes):
        return signal.SIGKILL
    if any(type(each).__name__ == "CppCompileError" for each in causes):
        for each in causes:
            if isinstance(each, subprocess.CalledProcessError):
                return _ENDS_COMPILER.get(-each.returncode)
    return None


def _compiler_problem(error: BaseException) -> UserError | None:
    number = killed_compiler(error)
    if number is None:
        return None
    if number != signal.SIGKILL:  # a terminal's signals reach all of its processes
        reason = f"stopped while it compiled ({number.name}); the same command resumes"
        return _ExplainedError(reason, exit_code=128 + number)
    return _ExplainedError(
        "the C++ compiler was killed, most likely because the host's memory was used up: lower "
        "the number of ranks per host, or set parallel.compile=false (traceback: RUN/logs)"
    )


def _reached_limit(error: BaseException) -> UserError | None:
    """Return an error that names the limit of the system that was reached, if one was."""
    if isinstance(error, MemoryError) or _is_failed_allocation(error):
        return _ExplainedError(f"out of memory: {_MEMORY} is reached; raise it, or use less")
    for text in _texts(error):
        for said, limit in _LIMITS.items():
            if said in text:
                return _ExplainedError(
                    f"{said}: {limit} is reached; raise it (traceback: RUN/logs)"
                )
    return None


def _is_failed_allocation(error: BaseException) -> bool:
    """Return whether an allocation failed in a place where CPython raises no MemoryError.

    Seen while modules were imported under a limit of the address space; without one it is a bug.
    """
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return is_limited and isinstance(error, SystemError) and _NO_EXCEPTION in str(error)


def _broken_collective(error: Exception) -> UserError | None:
    """Return an error in one line if ``error`` says that a connection to another rank broke."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as dist

    first = str(error).partition("\n")[0]
    if not isinstance(error, dist.DistError) and _GLOO not in first:
        return None
    what = first.rpartition(_GLOO)[2].partition(". ")[0]
    return _ExplainedError(
        "a collective failed, most likely because another rank exited first; see that rank's "
        f"message ({what:.200}; traceback: RUN/logs)"
    )


def _texts(error: BaseException) -> Iterator[str]:
    """Yield the message of an error and of those that it came from."""
    return map(str, _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _print_problems(error: UserError, prefix: str) -> None:
    for problem in error.problems:
        print(f"{prefix}error: {problem}", file=sys.stderr)


def _has_process_group() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _record_for_torchrun(error: BaseException) -> None:
    """Let torchrun's closing summary show this rank's error: its traceback, or the problems of a
    ``UserError``."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    shown = str(error) if isinstance(error, UserError) else "".join(format_exception(error))
    details = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
    with suppress(OSError):  # e.g. the disk for temporary files is full
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        path.write_text(json.dumps({"message": message}), encoding="utf-8")


def _exit_now(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
