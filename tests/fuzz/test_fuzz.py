"""A few examples of each target of ``python -m tests.fuzz``, with a fixed seed."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, seed, settings

from tests.fuzz.targets import TARGETS, counted


@pytest.mark.parametrize("name", TARGETS)
def test_readers_read_or_refuse(name: str) -> None:
    counted.clear()
    few = settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    seed(0)(few(TARGETS[name]))()
    assert sum(counted.values()) >= 50
