"""This process's rank, device, process groups and mesh."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jepa_dist.config import ParallelConfig
from jepa_dist.errors import SharedError, UserError
from jepa_dist.parallel.determinism import use_deterministic_algorithms
from jepa_dist.parallel.gloo import use_one_worker
from jepa_dist.parallel.meeting import launcher_store, store_of_this_start
from jepa_dist.parallel.messages import broadcast_json, gather_json
from jepa_dist.process.dist_env import (
    is_launched,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    listen_on_loopback,
)
from jepa_dist.run.consistency import Statement, check_alike


@dataclass(frozen=True)
class World:
    """The ranks of this job, and this process's rank, device and groups."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """1-D ``dp_shard``, or 2-D ``dp_replicate x dp_shard`` when there are replicas."""
    control: dist.ProcessGroup
    """gloo group for control messages (StepPlan); never used for device tensors."""
    timeout: timedelta
    """Longest wait in a collective."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that makes decisions, writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set on any rank. Collective."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` (``messages``: JSON), in rank order. Collective."""
        return gather_json(value, self.control)

    def fills_compile_cache(self) -> bool:
        """Return whether this rank is the first of those that can share compiled graphs: ranks on
        one host with the same device index, which is part of the cache key. Collective."""
        places = self.gather([socket.gethostname(), self.device.index])
        return places.index(places[self.rank]) == self.rank

    def run_on_main(self, fn: Callable[[], Any]) -> Any:
        """Run ``fn`` on rank 0; return its result (``messages``: JSON) on every rank. Collective.

        Raises:
            SharedError: on every rank, if ``fn`` raised a ``UserError``.
        """
        outcome: list[Any] = [None, []]
        if self.is_main:
            try:
                outcome = [fn(), []]
            except UserError as error:
                outcome = [None, error.problems]
        result, problems = broadcast_json(outcome, self.control)
        if problems:
            raise SharedError(*problems)
        return result


def start_world(
    config: ParallelConfig, mine: Statement | None = None, store: Store | None = None
) -> World:
    """Join the process group (NCCL and gloo on CUDA, gloo on CPU) and build the mesh.

    Without a launcher the world has one rank.

    Args:
        config: The mesh and the time limit.
        mine: What must be the same on every rank (``consistency.statement``); None skips the
            comparison.
        store: Rendezvous store (default: the launcher's).

    Raises:
        SharedError: on every rank, if the ranks differ in configuration, data, code or libraries.
        UserError: more ranks on this host than CUDA devices.
    """
    if config.deterministic:
        use_deterministic_algorithms()
    rank, world_size = launched_rank(), launched_world_size()
    local_rank = launched_local_rank()
    device = _device(local_rank)
    timeout = timedelta(seconds=config.timeout_seconds)
    if not dist.is_initialized():
        listen_on_loopback(os.environ)
        store = _meet(rank, world_size, timeout) if store is None else store
        if mine is not None:
            check_alike({**mine, **_device_facts(device)}, store, rank, world_size)
        if device.type == "cpu":
            use_one_worker()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process_group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=device,
        mesh=build_mesh(config, world_size, device),
        control=dist.new_group(backend="gloo", timeout=timeout),
        timeout=timeout,
    )


def _meet(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return the rendezvous store of this start of the ranks."""
    if not is_launched():
        return HashStore()
    return store_of_this_start(launcher_store(timeout), rank, world_size, timeout)


def _device_facts(device: torch.device) -> dict[str, str]:
    """Return what else must be identical on all ranks: device type, CUDA and NCCL versions."""
    if device.type == "cpu":
        return {"device": "cpu"}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": "cuda", "version of cuda": str(torch.version.cuda), "version of nccl": nccl}


def record_collectives(folder: Path) -> None:
    """Make NCCL record its last collectives and write them to ``folder`` when one times out.

    Call this before ``start_world``; environment variables that are set already are kept. Read the
    files with ``torchfrtrace`` (they are in PyTorch's own pickle format).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_rank_"))


def stop_world() -> None:
    """Destroy the process group; without this, the exit occasionally aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}: this host has {torch.cuda.device_count()} CUDA device(s); "
            "start at most one rank per device (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # Accumulate the partial sums of split-K matrix products in float32. By default torch rounds
    # them to bfloat16, with a split that depends on shapes and on the GPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def build_mesh(config: ParallelConfig, world_size: int, device: torch.device) -> DeviceMesh:
    """Return the mesh: 1-D ``dp_shard``, or 2-D ``dp_replicate x dp_shard`` with replicas."""
    replicas = config.dp_replicate
    if replicas == 1:
        # A (1, ranks) mesh would create a process group of size one for every rank.
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        device.type,
        (replicas, world_size // replicas),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
