"""Identify processes by more than their pid, which may be reused or repeated in a container."""

from __future__ import annotations

import os
from pathlib import Path


def pid_namespace() -> str:
    """Return an id shared by exactly the processes of one boot that see each other's pids.

    Raises:
        OSError: not on Linux.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def start_ticks(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; None if it has ended (Linux).

    Unlike a time of day it stays the same when the clock is set.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
