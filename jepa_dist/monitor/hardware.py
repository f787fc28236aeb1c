"""Peak FLOP/s of devices, and this process's resident memory."""

from __future__ import annotations

import re

import psutil

_GIB = 2**30

# Peak dense bf16 TFLOP/s, half the figures with sparsity in NVIDIA's data sheets: A100 (2020), H100
# SXM, PCIe and NVL (2022 to 2024), H200 SXM and NVL (2024), HGX B200 (2024). The first entry that
# is a prefix of the device's name applies.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
}
# Matches e.g. NVIDIA A100-SXM4-40GB MIG 1g.5gb, NVIDIA A100-2-10C, GRID A100D-4C.
_SLICE = re.compile(r"\bMIG\b|-\d+(-\d+)?[ABCQ]$")


def peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device; None if unknown.

    A prefix must end at a word boundary: an RTX A1000 is not an A100. The peak of a partition (MIG,
    vGPU) is unknown: its name does not say which share of the device it has.
    """
    if _SLICE.search(device_name):
        return None
    for name, tflops in _PEAK_TFLOPS.items():
        if re.match(rf"(NVIDIA )?{name}\b", device_name):
            return tflops * 1e12
    return None


def resident_gib() -> float:
    """Return the resident memory of this process in GiB."""
    return psutil.Process().memory_info().rss / _GIB
