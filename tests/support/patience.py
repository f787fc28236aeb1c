"""Time limits of tests: they end hangs, and are far above what a busy machine needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

# A test shares the cores with its own processes, with other workers, and with other programs.
_BUSY = 4.0
# Upper bound, so that one hanging test does not delay all others.
_LONGEST_SECONDS = 1500.0


def patience(seconds: float) -> float:
    """Return the time limit for what takes at most ``seconds`` on an idle machine.

    Processes that a test starts get the same answer as the test.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    per_core = max(1.0, workers / len(os.sched_getaffinity(0)))
    return max(seconds, min(_BUSY * per_core * seconds, _LONGEST_SECONDS))


def wait_until(
    condition: Callable[[], bool],
    seconds: float,
    problem: Callable[[], object] = lambda: "",
    every: float = 0.05,
) -> None:
    """Check ``condition`` every ``every`` seconds, at most for ``patience(seconds)``.

    Raises:
        AssertionError: it does not; ``problem()`` is the message.
    """
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline, f"not after {patience(seconds):.0f} s: {problem()}"
        time.sleep(every)
