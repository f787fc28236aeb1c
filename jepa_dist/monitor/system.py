"""Metrics of this process's host: CPU, memory, disk, and the GPU if it can be queried."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import psutil
import torch


class SystemReader:
    """Reader of the host's metrics, over all processes.

    Args:
        run_dir: Its file system's free space is reported.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        psutil.cpu_percent()  # later calls return the mean since this one

    def record(self) -> dict[str, float]:
        """Return the metrics, CPU usage as mean since the last record; unreadable ones are
        omitted."""
        record = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": psutil.virtual_memory().percent,
        }
        with suppress(OSError):
            record["system/disk_free_gib"] = shutil.disk_usage(self._run_dir).free / 2**30
        return record | _gpu()


def _gpu() -> dict[str, float]:
    """Return metrics of this process's GPU; empty without the package nvidia-ml-py or without
    permission."""
    if not torch.cuda.is_available():
        return {}
    # The base class of NVML's exceptions cannot be named without the package.
    with suppress(Exception):
        return {
            "system/gpu_percent": float(torch.cuda.utilization()),
            "system/gpu_celsius": float(torch.cuda.temperature()),
        }
    return {}
