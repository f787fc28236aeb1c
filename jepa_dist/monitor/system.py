"""The host of this process: processor, memory, disk, and the GPU where it can be read."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import psutil
import torch


class SystemReader:
    """Reads what is going on on the host, all processes together.

    Args:
        run_dir: Whose disk is looked at.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        psutil.cpu_percent()  # means are since the call before

    def record(self) -> dict[str, float]:
        """Metrics; those of the processor since the record before. What cannot be read is left
        out."""
        record = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": psutil.virtual_memory().percent,
        }
        with suppress(OSError):
            record["system/disk_free_gib"] = shutil.disk_usage(self._run_dir).free / 2**30
        return record | _gpu()


def _gpu() -> dict[str, float]:
    """Of this process's device; nothing without the package nvidia-ml-py or the right to look."""
    if not torch.cuda.is_available():
        return {}
    # NVML's own exceptions have no base class that could be named without the package.
    with suppress(Exception):
        return {
            "system/gpu_percent": float(torch.cuda.utilization()),
            "system/gpu_celsius": float(torch.cuda.temperature()),
        }
    return {}
