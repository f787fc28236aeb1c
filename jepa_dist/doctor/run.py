"""All checks: collect every rank's report, print the table, return the problems."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from jepa_dist.doctor.findings import Report, findings, table
from jepa_dist.doctor.probes import (
    allreduce_gbps,
    check_files,
    clock_offset,
    free_gib,
    matmul_tflops,
    ring_gbps,
)
from jepa_dist.doctor.topology import interface_to, node_name, num_nodes
from jepa_dist.parallel.world import World
from jepa_dist.run.consistency import code_digest


def run_checks(world: World, folder: Path, need_gib: float) -> list[str]:
    """Measure on all ranks and print the table on rank 0. Collective.

    Args:
        world: The ranks.
        folder: Where the runs will be.
        need_gib: Free space required there, in GiB.

    Returns:
        One line per problem, the same on every rank.
    """
    report = _report(world, folder)
    bandwidth = allreduce_gbps(world)
    known = [Report(**each) for each in world.gather(asdict(report))]
    problems = findings(known, str(folder), need_gib)
    if world.is_main:
        print(*table(known), sep="\n")
        if bandwidth is not None:
            print(f"all-reduce over {world.world_size} ranks: {bandwidth:.3g} GB/s (bus bandwidth)")
    return problems


def _report(world: World, folder: Path) -> Report:
    """Return this rank's report. Collective."""
    nodes = num_nodes(os.environ)
    # With several nodes, measure the links between them: each rank sends to the rank with the same
    # local rank on the next node.
    stride = world.world_size // nodes
    ahead, error = clock_offset(world)
    return Report(
        rank=world.rank,
        node=node_name(os.environ),
        versions=_versions(world),
        interface=_interface(),
        clock_ahead=ahead,
        clock_error=error,
        free_gib=free_gib(folder),
        files=check_files(folder, world),
        has_hidden_gpu=_has_hidden_gpu(),
        matmul_tflops=matmul_tflops(world),
        ring_gbps=ring_gbps(world, stride if nodes > 1 else 1),
    )


def _versions(world: World) -> dict[str, str]:
    """Return the versions that must be identical on all nodes."""
    on_gpu = world.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "-") if on_gpu else "-",
        "driver": _driver() if on_gpu else "-",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "-",
        "code": code_digest(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "CPU",
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, check=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "?"
    return answer.stdout.split()[0]


def _has_hidden_gpu() -> bool:
    is_hidden_on_purpose = "CUDA_VISIBLE_DEVICES" in os.environ
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return has_gpu and not is_hidden_on_purpose and not torch.cuda.is_available()


def _interface() -> str:
    if "MASTER_ADDR" not in os.environ:
        return "-"
    name, address = interface_to(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return f"{name} {address}"
