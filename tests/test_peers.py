"""When a rank exits, its peers exit too, also while they hang in a collective."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from jepa_dist.monitor.peers import Peers
from tests.support.commands import TORCHRUN, Command
from tests.support.patience import patience

# torchrun kills after 30 s.
SOON = patience(25.0)

HANGING = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from jepa_dist.monitor.peers import Peers
from jepa_dist.process.signals import StopRequest

dist.init_process_group("gloo")
rank = dist.get_rank()
groups = [dist.new_group([0, 1]) for _ in range(2)]
StopRequest(300, Peers(Path(sys.argv[1]), rank, "this").leave_if_local_rank_ended)
print(f"rank {rank} hangs", flush=True)
if rank == 2:
    import time
    time.sleep(600)
# Ranks 0 and 1 wait for each other in different collectives, and neither connection breaks.
dist.all_reduce(torch.ones(1), group=groups[rank])
"""

WATCHED = """
import os
import sys
import time
from pathlib import Path

from jepa_dist.monitor.step_timer import Place
from jepa_dist.monitor.peers import Peers
from jepa_dist.monitor.watchdog import Watchdog

run_dir = Path(sys.argv[1])
(run_dir / "logs").mkdir()
place = Place(1, 1, "forward")
peers = Peers(run_dir, 0, "this")
with Watchdog(run_dir, 0, 2, lambda: place, 2.0, peers.leave_if_reported):
    print("watched", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_hanging_ranks_exit_when_one_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "hanging.py"
    program.write_text(HANGING)
    launcher = [*TORCHRUN[:-1], "--nproc-per-node=3"]
    environ = {"PYTHONPATH": Path(__file__).parent.parent}
    with Command([*launcher, program, tmp_path / "run"], environ=environ) as job:
        job.wait_for(lambda: job.output().count("hangs") == 3, 120)
        time.sleep(0.5)  # all are inside
        job.rank(2).kill()
        killed = time.monotonic()
        finished = job.wait(60)
    assert time.monotonic() - killed < SOON
    assert finished.code != 0
    # The first exit breaks the other's connection, which may come before its own check.
    assert re.search(r"\[rank [01]\] error: rank 2 on ", finished.output)


def test_a_report_from_another_host_ends_a_rank(tmp_path: Path) -> None:
    with Command([sys.executable, "-c", WATCHED, tmp_path]) as process:
        process.wait_for(lambda: "watched" in process.output(), 60)
        Peers(tmp_path, 1, "an earlier start").report_failure("must not count")
        time.sleep(1.5)  # three beats
        assert process.process() is not None
        Peers(tmp_path, 1, "this").report_failure("the cause")
        Peers(tmp_path, 2, "this").report_failure("a consequence")
        finished = process.wait(60)
    assert finished.code == 1
    assert "[rank 0] error: rank 1 on " in finished.output
    assert "the cause; exiting" in finished.output
