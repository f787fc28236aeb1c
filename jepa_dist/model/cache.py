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
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import ModelConfig
from jepa_dist.model.execution import execution_order
from jepa_dist.model.layers import Attend, Attention, causal_attention, same_document
from jepa_dist.model.places import Places


class HasPlaces(Protocol):
    """A model whose attention can use the cache."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules."""

    def places(self, tokens_BT: Tensor, length: int | None = None) -> Places:
        """Return where the positions of rows are (``GPT.places``)."""


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
        self._phase = phase
        self._batch = batch
        # Allocated in the first pass, when dtype and device are known.
        self._buffers: list[Tensor] = []
        self._executions = len(order.encoder) + len(order.decoder)
        self._tokens: Tensor | None = None
        self._documents: Tensor | None = None  # of all positions, those of this pass included
        self._attentions: list[Attention] = []  # of the model that uses the cache
        self._next = 0  # index of the execution that attends next

    @contextmanager
    def extended(self, model: HasPlaces, tokens_BT: Tensor, phase: int) -> Iterator[Places]:
        """Make the model's attention use the cache within this context, for these positions.

        Yields:
            The places of the new positions.

        Raises:
            ValueError: wrong phase, too many positions, or several at once after the first pass.
        """
        count = tokens_BT.size(1)
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
        before: list[Attend] = [attention.attend for attention in attentions]
        self._next = 0
        try:
            for attention in attentions:
                attention.attend = self._attend
            yield self._new_places(model, tokens_BT)
        finally:
            for attention, attend in zip(attentions, before, strict=True):
                attention.attend = attend
        self.used += count

    def _new_places(self, model: HasPlaces, tokens_BT: Tensor) -> Places:
        end = self.used + tokens_BT.size(1)
        if self._tokens is None:
            self._tokens = tokens_BT.new_empty(self._batch, self.length)
        self._tokens[:, self.used : end] = tokens_BT
        places = model.places(self._tokens[:, :end], self.length)
        self._documents = places.documents_BT
        return places.since(self.used)

    def _attend(
        self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None
    ) -> Tensor:
        """Append this execution's keys and values, and attend to all cached; [B, H, T, C]."""
        if not self._buffers:
            shape = (self._executions, 2, self._batch, k_BKTC.size(1), self.length, k_BKTC.size(3))
            self._buffers = list(k_BKTC.new_empty(shape))
        count, end = k_BKTC.size(2), self.used + k_BKTC.size(2)
        k_BKSC, v_BKSC = self._buffers[self._next][..., :end, :]
        self._next += 1
        k_BKSC[:, :, self.used :] = k_BKTC
        v_BKSC[:, :, self.used :] = v_BKTC
        # Several new positions are always the start of the row; a single one attends to all,
        # of its document.
        if count > 1:
            return causal_attention(q_BHTC, k_BKSC, v_BKSC, documents_BT)
        visible_B11S = None
        if documents_BT is not None:
            assert self._documents is not None
            visible_B11S = same_document(documents_BT, self._documents)
        grouped = q_BHTC.size(1) != k_BKTC.size(1)
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKSC, v_BKSC, attn_mask=visible_B11S, enable_gqa=grouped
        )
