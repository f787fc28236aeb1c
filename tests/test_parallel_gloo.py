"""Collectives in flight at the same time on gloo do not corrupt memory."""

from __future__ import annotations

import sys

from tests.support.commands import run_command

# With two worker threads torch 2.13 aborts within about two seconds.
PROGRAM = """
import time

import torch
import torch.distributed as dist

from jepa_dist.config import ParallelConfig
from jepa_dist.parallel.world import start_world

world = start_world(ParallelConfig(compile=False))
group = dist.group.WORLD.group_name
tensors = [torch.ones(2000) for _ in range(64)]
end = time.monotonic() + 6
while time.monotonic() < end:
    gathered = [torch.ops._c10d_functional.all_gather_into_tensor(t, 1, group) for t in tensors]
    for tensor in gathered:
        assert torch.ops._c10d_functional.wait_tensor(tensor).sum() == 2000
print("done")
"""


def test_concurrent_gathers_do_not_crash() -> None:
    finished = run_command(sys.executable, "-c", PROGRAM)
    assert (finished.code, finished.output) == (0, "done\n")
