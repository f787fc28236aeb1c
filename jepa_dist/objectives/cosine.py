"""Cosines whose norms have a floor.

The gradient of a cosine grows as 1/norm. A floor relative to the size of the states bounds it; each
norm is floored separately.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ABSOLUTE_FLOOR = 1e-8


def floored_cosine(a_BPD: Tensor, b_BPD: Tensor, norm_floor: float) -> tuple[Tensor, Tensor]:
    """Compute the cosine of each pair of vectors.

    The norms of ``a`` are floored at ``norm_floor`` times the RMS norm of the row's own vectors,
    those of ``b`` likewise; see ``row_floor``.

    Returns:
        [B, P] cosines (float32, or float64 for float64 vectors), and [B, P] float 0/1: whether one
        of the norms hit its floor.
    """
    a_BPD, b_BPD = at_least_float32(a_BPD), at_least_float32(b_BPD)
    a_norm_BP, b_norm_BP = (torch.linalg.vector_norm(x, dim=-1) for x in (a_BPD, b_BPD))
    a_floor_B1, b_floor_B1 = row_floor(a_BPD, norm_floor), row_floor(b_BPD, norm_floor)
    unit_a_BPD = a_BPD / torch.maximum(a_norm_BP, a_floor_B1).unsqueeze(-1)
    unit_b_BPD = b_BPD / torch.maximum(b_norm_BP, b_floor_B1).unsqueeze(-1)
    is_floored_BP = (a_norm_BP.detach() < a_floor_B1) | (b_norm_BP.detach() < b_floor_B1)
    return (unit_a_BPD * unit_b_BPD).sum(-1), is_floored_BP.float()


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
