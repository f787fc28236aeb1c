"""Helper processes: an ordered parallel map, and signal handling of helpers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from jepa_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Ctrl-C and schedulers' signals reach every process of a terminal's or a job's group, but the
# parent handles them (it saves, cleans up), and needs its helpers for that.
_PARENTS_SIGNALS = {
    *(signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
}
# A fork server ignores SIGTERM, too; a helper does not, because multiprocessing ends one that hangs
# by SIGTERM.
_FORK_SERVERS_SIGNALS = {*_PARENTS_SIGNALS, signal.SIGTERM}


def become_helper(outlast_sigterm: float = 0.0) -> None:
    """Make this process a helper: ignore the parent's signals; exit when the parent dies.

    This includes SIGKILL of the parent. It watches the parent's multiprocessing sentinel, which
    also works if the operating system's parent is a fork server (PR_SET_PDEATHSIG and getppid would
    watch that one instead).

    Args:
        outlast_sigterm: Seconds to continue after a SIGTERM, for a parent that finishes a step:
            torchrun sends SIGTERM to a rank's whole process group.
    """
    # Before any thread starts: threads inherit the mask, and a single thread that does not block a
    # signal lets it end the process.
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORK_SERVERS_SIGNALS)
    if outlast_sigterm > 0:
        _start_thread(_exit_some_time_after_sigterm, outlast_sigterm)
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, _PARENTS_SIGNALS)
    _start_thread(_exit_after_parent)


def _start_thread(target: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


def _exit_some_time_after_sigterm(seconds: float) -> None:
    sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    parent = multiprocessing.parent_process()
    # The parent's own SIGTERM (multiprocessing's, to end a helper) is meant for this process.
    if parent is None or sender != parent.pid:
        time.sleep(seconds)
    os._exit(1)


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def signals_left_to_parent() -> Iterator[None]:
    """Make processes started in this context, fork servers included, block the parent's signals."""
    # Child processes inherit blocked signals. Start the resource tracker first: starting it
    # unblocks SIGTERM again. (If it were restarted when the parent stops, the new one would print
    # a traceback for every semaphore, which it does not know.)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORK_SERVERS_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``map(function, items)`` in order, computed in ``workers`` processes.

    ``function`` is sent to each process once; ``items`` is read one task per process ahead.
    Close the iterator (contextlib.closing) to stop the processes before all results are taken.

    Raises:
        UserError: a process died. Exceptions of ``function`` propagate.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with signals_left_to_parent():
        helpers = [_Helper(function) for _ in range(workers)]
    busy: deque[_Helper] = deque()  # oldest task first
    try:
        for item in items:
            done = []
            helper = helpers[len(busy) % workers]
            if len(busy) == workers:
                helper = busy.popleft()
                done.append(helper.take())
            helper.give(item)
            busy.append(helper)
            yield from done
        for helper in busy:
            yield helper.take()
    finally:
        for helper in helpers:
            helper.process.terminate()
        for helper in helpers:
            helper.process.join()


class _Helper:
    """A process with a private pipe.

    A shared queue, as in concurrent.futures, hangs forever if a process dies in the middle of a
    message; a private pipe ends.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_help, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Any) -> None:
        """Send a task; the result of the previous one must have been taken."""
        try:
            self._pipe.send(item)
        except BrokenPipeError:
            raise self._death() from None

    def take(self) -> Any:
        """Wait for the result of the task; return it or raise its exception."""
        try:
            result, error = self._pipe.recv()
        except (EOFError, OSError):  # the latter: died in mid-message
            raise self._death() from None
        if error is not None:
            raise error
        return result

    def _death(self) -> UserError:
        return UserError(
            f"helper process {self.process.pid} died (killed, possibly for lack of memory); try "
            "fewer --workers"
        )


def _help(pipe: Connection, function: Callable[[Any], Any]) -> None:
    become_helper()
    while True:
        item = pipe.recv()
        try:
            pipe.send((function(item), None))
        except Exception as error:
            pipe.send((None, error))
