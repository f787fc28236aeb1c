"""Keys and values of earlier positions, so that the next token costs a pass over one position.

Only attention looks at other positions, so only attention knows the cache: for the time of a pass
``Attention.attend`` is replaced by a function that appends the keys and values it is given and
attends over all that are there. Blocks run as they are, with the rotary tables of the positions
that are new. The code of training, and its compiled graphs, are not touched.

Tensor names carry their shape: B batch, H query heads, K key/value heads, C head width, T new
positions, S positions that are cached, R rotated dimensions of a head.
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
    """One pair of buffers per execution of a block in a pass: a block that is repeated (depth
    recurrence) sees another stream each time, hence other keys and values.

    Keys are stored rotated. The rotary base depends on the length of a row where that exceeds
    ``model.seq_len`` (NTK rescale), so the length is fixed at the beginning: a pass with the cache
    computes what a pass over a whole row of ``length`` positions does.

    Args:
        config: The model.
        phase: Recurrence phase of all passes.
        length: Most positions that the cache will hold.
        batch: Rows.

    Attributes:
        used: Positions that are cached, 0..length.
    """

    def __init__(self, config: ModelConfig, *, phase: int, length: int, batch: int = 1) -> None:
        order = execution_order(config, phase)
        self.length = length
        self.used = 0
        self._config = config
        self._phase = phase
        self._batch = batch
        # Allocated by the first pass, which knows dtype and device.
        self._buffers: list[Tensor] = []
        self._executions = len(order.encoder) + len(order.decoder)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._attentions: list[Attention] = []  # of the model that uses the cache
        self._next = 0  # index of the execution that attends next

    @contextmanager
    def extended(self, model: nn.Module, count: int, phase: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Let the model's attention use the cache within the block, for ``count`` new positions.

        Yields:
            Rotary cosines and sines of the new positions, float32 [T, R/2] each.

        Raises:
            ValueError: another phase, more positions than fit, or several at once after the first
                pass.
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
        """Append the keys and values of this execution and attend to all before; [B, H, T, C]."""
        if not self._buffers:
            shape = (self._executions, 2, self._batch, k_BKTC.size(1), self.length, k_BKTC.size(3))
            self._buffers = list(k_BKTC.new_empty(shape))
        count, end = k_BKTC.size(2), self.used + k_BKTC.size(2)
        k_BKSC, v_BKSC = self._buffers[self._next][..., :end, :]
        self._next += 1
        k_BKSC[:, :, self.used :] = k_BKTC
        v_BKSC[:, :, self.used :] = v_BKTC
        grouped = q_BHTC.size(1) != k_BKTC.size(1)
        # One new position sees everything; several are the beginning of the row.
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKSC, v_BKSC, is_causal=count > 1, enable_gqa=grouped
        )
