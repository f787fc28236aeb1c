"""KV cache: keys and values of earlier positions, so that a new token costs one position's pass.

Only attention uses the cache: during a pass, ``Attention.attend`` is replaced by a function that
appends the keys and values of the new positions and attends to all cached ones. Blocks run
unchanged, with the rotary tables of the new positions. Training code and its compiled graphs are
not affected.

Tensor names carry their shape: B batch, H query heads, K key/value heads, C head width, T new
positions, S cached positions, R rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import ModelConfig
from jepa_dist.model.execution import execution_order
from jepa_dist.model.layers import Attention, rope_tables


class KVCache:
    """Key and value buffers, one pair per execution of a block in a pass: a repeated block (depth
    recurrence) has a different input, hence different keys and values, each time.

    Keys are stored rotated. The rotary base depends on the row length if that exceeds
    ``model.seq_len`` (NTK rescale), so the length is fixed in advance: passes with the cache
    compute the same as one pass over a row of ``length`` positions.

    Args:
        config: The model.
        phase: Recurrence phase of all passes.
        length: Maximum number of positions.
        batch: Number of rows.

    Attributes:
        used: Number of cached positions, 0..length.
    """

    def __init__(self, config: ModelConfig, *, phase: int, length: int, batch: int = 1) -> None:
        order = execution_order(config, phase)
        self.length = length
        self.used = 0
        self._config = config
        self._phase = phase
        self._batch = batch
        # Allocated in the first pass, when dtype and device are known.
        self._buffers: list[Tensor] = []
        self._executions = len(order.encoder) + len(order.decoder)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._attentions: list[Attention] = []  # of the model that uses the cache
        self._next = 0  # index of the execution that attends next

    @contextmanager
    def extended(self, model: nn.Module, count: int, phase: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the model's attention use the cache within this context, for ``count`` positions.

        Yields:
            Rotary cosines and sines of the new positions, float32 [T, R/2] each.

        Raises:
            ValueError: wrong phase, too many positions, or several at once after the first pass.
        """
        if phase != self._phase:
            raise ValueError(f"phase {phase}: the cache is of phase {self._phase}")
        if self.used + count > self.length:
            raise ValueError(
                f"{count} positions after {self.used}: the cache holds at most {self.length}"
            )
        if self.used and count > 1:
            raise ValueError("after the first pass, positions are added one at a time")
        if not self._attentions:
            self._attentions = [m for m in model.modules() if isinstance(m, Attention)]
        attentions = self._attentions
        before = [attention.attend for attention in attentions]
        self._next = 0
        try:
            for attention in attentions:
                attention.attend = self._attend
            yield self._new_tables(count, attentions[0].proj.weight.device)
        finally:
            for attention, attend in zip(attentions, before, strict=True):
                attention.attend = attend
        self.used += count

    def _new_tables(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None:
            self._tables = rope_tables(self._config, self.length, device)
        cos_TR, sin_TR = self._tables
        new = slice(self.used, self.used + count)
        return cos_TR[new], sin_TR[new]

    def _attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Append this execution's keys and values, and attend to all cached; [B, H, T, C]."""
        if not self._buffers:
            shape = (self._executions, 2, self._batch, k_BKTC.size(1), self.length, k_BKTC.size(3))
            self._buffers = list(k_BKTC.new_empty(shape))
        count, end = k_BKTC.size(2), self.used + k_BKTC.size(2)
        k_BKSC, v_BKSC = self._buffers[self._next][..., :end, :]
        self._next += 1
        k_BKSC[:, :, self.used :] = k_BKTC
        v_BKSC[:, :, self.used :] = v_BKTC
        grouped = q_BHTC.size(1) != k_BKTC.size(1)
        # A single new position attends to all; several are always the start of the row.
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKSC, v_BKSC, is_causal=count > 1, enable_gqa=grouped
        )
