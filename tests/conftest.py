"""Settings of all tests: one thread per process; order and time limits for several workers."""

from __future__ import annotations

import gc
import signal
from collections import Counter

import hypothesis
import pytest
import torch

from tests.support.patience import patience
from tests.support.ranks import choose_imports_of_server

# Until all modules are imported and all tests collected: nothing of them is garbage.
gc.disable()
torch.set_num_threads(1)
# Milliseconds for one example; Hypothesis' own 200 are too few on a busy machine.
hypothesis.settings.register_profile("tests", deadline=1000 * patience(2))
hypothesis.settings.load_profile("tests")

# Tests of SLURM mostly wait: their files start first.
_SLURM_WEIGHT = 100


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let Ctrl-C end a worker's test in order, so that the processes it started end, too."""
    if hasattr(session.config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Prepare for workers that share the machine (pytest -n); without workers change nothing."""
    if not hasattr(config, "workerinput"):
        return
    _start_long_files_first(items)
    _extend_time_limits(config, items)


def pytest_collection_finish() -> None:
    """Set up the fork server before any test, after all imports."""
    choose_imports_of_server()
    gc.freeze()
    gc.enable()


def _start_long_files_first(items: list[pytest.Item]) -> None:
    """Order files by length: workers take entire files, and short ones last balance the load."""
    weights: Counter[str] = Counter()
    for item in items:
        weights[_file(item)] += _SLURM_WEIGHT * _has(item, "slurm") + _has(item, "slow")
    items.sort(key=lambda item: -weights[_file(item)])


def _extend_time_limits(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Multiply the time limits by the patience factor."""
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = float(mark.args[0] if mark else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _has(item: pytest.Item, mark: str) -> bool:
    return item.get_closest_marker(mark) is not None
