"""Shared fixtures: the golden cases and one thread per process (the machine has few cores)."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
