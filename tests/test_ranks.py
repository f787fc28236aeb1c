"""What the tests' own ranks report when they fail."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.ranks import run_ranks


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ConnectionError("rank 0 closed the connection")
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_killed_rank_is_reported_though_its_peer_ended_first() -> None:
    with pytest.raises(RuntimeError, match=r"^rank 0 exited -9:"):
        run_ranks(_die, 2)
