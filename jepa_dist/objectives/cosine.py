"""Cosines whose norms have a floor.

The gradient of a cosine grows as 1/norm. A floor relative to the size of the states bounds it; each
norm is floored on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ABSOLUTE_FLOOR = 1e-8


def row_floor(states_BTD: Tensor, norm_floor: float) -> Tensor:
    """Return the floor of norms of each row, [B, 1], detached: ``norm_floor`` times the RMS norm of
    its states, or an absolute 1e-8 if that is 0 or smaller.

    It is taken per row, so that the loss of a row does not depend on its neighbors.
    """
    states = at_least_float32(states_BTD.detach())
    if norm_floor == 0:
        return torch.full_like(states[:, :1, 0], _ABSOLUTE_FLOOR)
    rms_B1 = states.square().sum(-1).mean(-1, keepdim=True).sqrt()
    return (norm_floor * rms_B1).clamp_min(_ABSOLUTE_FLOOR)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
