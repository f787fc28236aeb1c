"""How a rank ends when something goes wrong: loudly, at once, and with the right exit code (C7).

Mistakes that every rank sees alike (configuration, data, run directory) are told once, by rank 0.
A failure of one rank is told by that rank, which then leaves without waiting for anybody: torchrun
sees it and ends the others.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from jepa_dist.command_line import UNFORESEEN, errors_in_one_line
from jepa_dist.errors import SharedError, UserError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + 2

# Ranks other than 0 leave this much later, or torchrun would end rank 0 before it has spoken.
_LET_MAIN_SPEAK_SECONDS = 2.0
# Longest wait for a note about a failure: the file system may be what hangs.
_NOTE_SECONDS = 5.0

# What the dynamic loader says of a file of the compiler's cache that was not written to its end.
_BROKEN_LIBRARY = re.compile(
    r"(/[^:\n]+\.so): (?:file too short|invalid ELF header|cannot read file data|"
    r"ELF file data encoding|object file has no|failed to map segment|ELF load command)"
)

log = logging.getLogger(__name__)


@contextmanager
def told_by_host() -> Iterator[None]:
    """For checks before the ranks meet: the first rank of each host prints the problems of its own
    command, files and environment, all others of the host leave with the same code."""
    try:
        with errors_in_one_line():
            yield
    except UserError as error:
        _tell_host(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _tell_host(error: UserError) -> NoReturn:
    # The environment may be what is wrong: without a number this process speaks.
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if local_rank == "0" or not local_rank.isdecimal():
        _print_problems(error, prefix="" if rank in ("0", "") else f"[rank {rank}] ")
    else:
        time.sleep(_LET_MAIN_SPEAK_SECONDS)
    sys.exit(error.exit_code)


@contextmanager
def told_once(rank: int, on_failure: Callable[[], None] | None = None) -> Iterator[None]:
    """For what fails on every rank alike: rank 0 prints the problems, all exit with its code.

    Args:
        rank: This one.
        on_failure: Called first.
    """
    try:
        with errors_in_one_line():
            yield
    except UserError as error:
        if on_failure is not None:
            on_failure()
        if isinstance(error.__cause__, UNFORESEEN) and rank != 0:  # perhaps of this rank alone
            _print_problems(error, prefix=f"[rank {rank}] ")
        _tell_once(error, rank)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _tell_once(error: UserError, rank: int) -> NoReturn:
    if rank == 0:
        _print_problems(error, prefix="")
    else:
        time.sleep(_LET_MAIN_SPEAK_SECONDS)
    if _has_process_group():
        # Tearing down the interpreter with one about aborts now and then.
        _leave(error.exit_code)
    sys.exit(error.exit_code)


@contextmanager
def told_by_this_rank(rank: int, on_failure: Callable[[str], None] | None = None) -> Iterator[None]:
    """For what may fail on one rank only: it reports and leaves at once, skipping all clean-up.

    Clean-up would wait for ranks that wait for this one.

    Args:
        rank: This one.
        on_failure: Called first, with one line that says what happened.
    """
    try:
        with _noted(on_failure):
            yield
    except SharedError as error:
        log.error("%s", error)
        _tell_once(error, rank)
    except UserError as error:
        _record_for_torchrun(error)
        log.error("%s", error)
        _print_problems(error, prefix=f"[rank {rank}] ")
        _leave(error.exit_code)
    except KeyboardInterrupt:
        print(f"[rank {rank}] interrupted", file=sys.stderr)
        _leave(EXIT_INTERRUPTED)
    except Exception as error:
        _record_for_torchrun(error)
        if (broken := _broken_library(error)) is not None:
            log.exception("failed")
            _print_problems(broken, prefix=f"[rank {rank}] ")
            _leave(broken.exit_code)
        log.exception("failed")
        print(f"[rank {rank}] failed:", file=sys.stderr)
        traceback.print_exc()
        if _is_broken_collective(error):
            print(
                f"[rank {rank}] a collective broke: most likely another rank ended first; "
                "its own message says why",
                file=sys.stderr,
            )
        _leave(EXIT_FAILURE)


@contextmanager
def _noted(on_failure: Callable[[str], None] | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if on_failure is not None:
            # The error that is under way matters more than a note that cannot be written.
            reason = str(error).partition("\n")[0] or type(error).__name__
            call_with_limit(on_failure, reason)
        raise


def call_with_limit(note: Callable[[str], None], reason: str) -> None:
    """Call ``note``, for some seconds: a file system that hangs must not keep a rank here."""

    def call() -> None:
        with suppress(Exception):
            note(reason)

    thread = threading.Thread(target=call, name="note", daemon=True)
    thread.start()
    thread.join(_NOTE_SECONDS)


def _broken_library(error: BaseException) -> UserError | None:
    """A compiled library that was cut short, if that is what ended the run.

    A process that is killed while it compiles may leave one in the cache of compiled graphs, which
    every later start loads.
    """
    seen: BaseException | None = error
    while seen is not None:
        if found := _BROKEN_LIBRARY.search(str(seen)):
            folder = os.path.dirname(found[1])
            return UserError(
                f"{found[1]}: not a whole library ({found[0].rpartition(': ')[2]}): a process was "
                "killed while it compiled, or the disk was full; delete this file's folder "
                f"({folder}) or all of the compiler's cache (TORCHINDUCTOR_CACHE_DIR)"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _print_problems(error: UserError, prefix: str) -> None:
    for problem in error.problems:
        print(f"{prefix}error: {problem}", file=sys.stderr)


def _has_process_group() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _is_broken_collective(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "Connection closed by peer" in str(error)


def _record_for_torchrun(error: BaseException) -> None:
    """Let torchrun's closing summary show this rank's error."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
