"""Deterministic algorithms on request (``parallel.deterministic``)."""

from __future__ import annotations

import os

import torch

# A fixed workspace per stream; with the default one cuBLAS may choose other algorithms each time.
_CUBLAS_WORKSPACE = ":4096:8"

EXCLUDED = "cuDNN attention, the atomic additions of the embedding's backward, autotuned kernels"
"""What deterministic algorithms replace, for people."""


def use_deterministic_algorithms() -> None:
    """Have PyTorch, cuBLAS and Inductor run deterministic algorithms only, from now on.

    Call it before the first operation on a CUDA device. An operation without a deterministic
    algorithm raises.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)  # Inductor's deterministic mode with it
    # Nothing here reads uninitialized memory; filling it costs bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
