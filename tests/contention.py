"""How much longer than alone a test may take when other workers share the machine with it."""

from __future__ import annotations

import os


def slowdown() -> float:
    """Return the factor for hard time limits: workers per core, at least 1.

    Processes that a test starts get the same answer as the test.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1.0, workers / len(os.sched_getaffinity(0)))
