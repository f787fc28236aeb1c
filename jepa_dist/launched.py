"""What the launcher (torchrun or none) says of this process, before any process group exists."""

from __future__ import annotations

import ctypes
import os
import signal
import socket


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """This process's rank (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def launched_local_rank() -> int:
    """This process's rank on its host (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_world_size() -> int:
    """Number of ranks (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_world_size() -> int:
    """Number of ranks on this host (1 without a launcher)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def tell_place() -> None:
    """On several hosts, say once for each of them which ranks it has got."""
    if launched_local_rank() != 0 or int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return
    first, count = launched_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    # Virtual nodes of SLURM share the name of their host.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(f"{ranks} of {launched_world_size()}: {host}", flush=True)


def die_with_launcher() -> None:
    """Let the kernel end this rank when torchrun's agent dies, even by SIGKILL (Linux).

    Otherwise it would train on unnoticed, for minutes.
    """
    if not is_launched():
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:  # it died before
        os._exit(128 + signal.SIGKILL)
