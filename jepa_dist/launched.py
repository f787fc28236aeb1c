"""What the launcher (torchrun or none) says of this process, before any process group exists."""

from __future__ import annotations

import ctypes
import os
import signal


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
