"""Positions of rows: their rotary angles, and the document that each belongs to.

Tensor names carry their shape: B batch, T sequence, R rotated dimensions of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Inputs of blocks that describe the positions."""

    cos: Tensor
    """Rotary cosines, float32 [T, R/2], or [B, T, R/2] if they differ by row."""
    sin: Tensor
    """Rotary sines, likewise."""
    documents_BT: Tensor | None
    """Number of each position's document in its row, int64; 0 is the end of a document that began
    before the row. None: attention crosses documents."""

    def since(self, start: int) -> Places:
        """Return the positions from ``start`` on."""
        documents = None if self.documents_BT is None else self.documents_BT[:, start:]
        return Places(self.cos[..., start:, :], self.sin[..., start:, :], documents)


def places_in_documents(
    is_start_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, reset: bool
) -> Places:
    """Return the places of rows in which documents are packed.

    Args:
        is_start_BT: Where documents begin, bool.
        cos_TR: Rotary cosines of positions 0..T-1.
        sin_TR: Rotary sines, likewise.
        reset: Count positions from the start of each document.
    """
    documents_BT = is_start_BT.cumsum(1)
    if not reset:
        return Places(cos_TR, sin_TR, documents_BT)
    index_T = torch.arange(is_start_BT.size(1), device=is_start_BT.device)
    first_BT = torch.where(is_start_BT, index_T, 0).cummax(1).values
    position_BT = index_T - first_BT
    return Places(cos_TR[position_BT], sin_TR[position_BT], documents_BT)
