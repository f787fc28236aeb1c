"""Deterministic algorithms on request (``parallel.deterministic``)."""

from __future__ import annotations

import os

import torch

# A fixed workspace per stream; with the default one cuBLAS may choose a different algorithm in
# each call.
_CUBLAS_WORKSPACE = ":4096:8"

EXCLUDED = "cuDNN attention, the atomic additions of the embedding's backward, autotuned kernels"
"""What deterministic algorithms replace, for messages."""


def use_deterministic_algorithms() -> None:
    """Make PyTorch, cuBLAS and Inductor use deterministic algorithms only.

    Call this before the first operation on a CUDA device. Afterwards, an operation without a
    deterministic algorithm raises.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)  # also enables Inductor's deterministic mode
    # This package never reads uninitialized memory; filling it costs bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
