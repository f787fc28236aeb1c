"""Helper processes: an ordered parallel map, and how every helper behaves."""

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

# Ctrl-C and the schedulers' signals reach every process of a terminal's or a job's group, but what
# to do about them (save, clean up) is the parent's decision, and it still needs its helpers then.
_PARENTS_SIGNALS = {
    *(signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
}
# Of SIGTERM a fork server must know nothing either, but a helper must: it is how multiprocessing
# ends one that hangs.
_FORK_SERVERS_SIGNALS = {*_PARENTS_SIGNALS, signal.SIGTERM}


def become_helper(outlast_sigterm: float = 0.0) -> None:
    """Make this process a helper: deaf to its parent's signals, and gone when the parent is.

    The parent may even be killed by SIGKILL. Its multiprocessing sentinel is watched, which also
    works where the operating system's parent is a fork server (PR_SET_PDEATHSIG and getppid
    would watch that one instead).

    Args:
        outlast_sigterm: Seconds to go on after a SIGTERM, for a parent that has a step to finish:
            torchrun ends a rank by a SIGTERM to its whole process group.
    """
    # Before any thread starts: threads inherit the mask, and one alone that lets a signal through
    # is enough for it to end the process.
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
    """Processes started inside, a fork server too, are deaf to their parent's signals at once."""
    # A blocked signal stays blocked in whatever a process starts. The resource tracker goes first:
    # starting it unblocks SIGTERM again. (Without one, semaphores that are freed when the parent
    # stops are unknown to the tracker that takes its place, which prints a traceback for each.)
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
    """``map(function, items)`` in ``workers`` processes, results in order.

    ``function`` is sent to each process once; ``items`` is read one task per process ahead.
    Close the iterator (contextlib.closing) to end the processes when not all results are taken.

    Raises:
        UserError: a process died. What ``function`` raises comes through.
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
    """A process with a pipe of its own.

    Shared queues, as concurrent.futures has, hang for ever when a process dies in the middle of
    a message; a private pipe simply ends.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_help, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Any) -> None:
        """Send a task; the last one's result must have been taken."""
        try:
            self._pipe.send(item)
        except BrokenPipeError:
            raise self._death() from None

    def take(self) -> Any:
        """Wait for the result of the task, or raise what it raised."""
        try:
            result, error = self._pipe.recv()
        except (EOFError, OSError):  # the latter: died in mid-message
            raise self._death() from None
        if error is not None:
            raise error
        return result

    def _death(self) -> UserError:
        return UserError(
            f"helper process {self.process.pid} died (killed, perhaps for want of memory); try "
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
