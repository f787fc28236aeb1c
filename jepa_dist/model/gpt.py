"""The reference GPT (parameter-golf PR #1412), numerically identical; a plain GPT without extras.

Tensor names carry their shape: B batch, T sequence, D model width, E embedding width,
V vocabulary, R rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import ModelConfig
from jepa_dist.model.cache import KVCache
from jepa_dist.model.execution import LAST_PHASE, Execution, execution_order
from jepa_dist.model.head import HeadRegion
from jepa_dist.model.layers import Block, rms_norm, rope_tables
from jepa_dist.model.places import Places, places_in_documents

EMBEDDED = -2
"""Tap of the embedded tokens, before the first block."""


class OutputLayer(NamedTuple):
    """The matrices that turn normalized states into logits."""

    head_VE: Tensor
    proj_ED: Tensor | None
    """Projection to the embedding's width; None if the widths are equal."""

    def detached(self) -> OutputLayer:
        """Return the same values without gradient."""
        return OutputLayer(
            self.head_VE.detach(), None if self.proj_ED is None else self.proj_ED.detach()
        )


class Output(NamedTuple):
    """The result of a pass over the model (a pytree, as FSDP2's hooks need)."""

    loss_sum: Tensor | None = None
    """Sum over all targets of weight times cross-entropy (nats), float32 scalar."""
    row_loss_B: Tensor | None = None
    """Each row's part of it, float32, without gradient; only in a pass with gradients, and only
    with ``HeadRegion.by_row``."""
    logits_BTV: Tensor | None = None
    """Logits after the soft cap, float32; only without targets."""
    taps: tuple[Tensor, ...] = ()
    """The requested hidden states, [B, T, D] each, in the activations' dtype."""


class EmbedRegion(nn.Module):
    """Token embedding. Has no parameters of its own: a tied embedding belongs to the root."""

    def forward(self, tokens_BT: Tensor, emb_VE: Tensor, proj_DE: Tensor | None) -> Tensor:
        """Look up, normalize in the embedding's width, project if the widths differ: [B, T, D]."""
        x_BTE = rms_norm(F.embedding(tokens_BT, emb_VE))
        return x_BTE if proj_DE is None else F.linear(x_BTE, proj_DE)


class SkipRegion(nn.Module):
    """U-Net skip: adds an encoder state to the decoder's stream."""

    def forward(
        self, x_BTD: Tensor, s_BTD: Tensor, weight_D: Tensor, gate_D: Tensor | None
    ) -> Tensor:
        """Return ``x + w s``, or ``g x + (1 - g) w s`` with g the sigmoid of the gate."""
        skip_BTD = weight_D * s_BTD
        if gate_D is None:
            return x_BTD + skip_BTD
        return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(gate_D))


class GPT(nn.Module):
    """A GPT with U-Net skips, depth recurrence and taps for the hidden states.

    Args:
        config: The model.
        bos_id: Id that begins every document; read only with ``document_mask``.
    """

    def __init__(self, config: ModelConfig, bos_id: int | None = None) -> None:
        super().__init__()
        width, embed_width = config.model_dim, config.embed_width
        self.config = config
        self.bos_id = bos_id
        self.tok_emb = nn.Embedding(config.vocab_size, embed_width)
        projected = embed_width != width
        self.embed_proj = nn.Linear(embed_width, width, bias=False) if projected else None
        self.head_proj = nn.Linear(width, embed_width, bias=False) if projected else None
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(embed_width, config.vocab_size, bias=False)
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        # As many rows as the longest phase needs; shorter phases do not use the last ones.
        rows = execution_order(config, LAST_PHASE).num_skips if config.unet_skips else 0
        self.skip_weights = nn.Parameter(torch.empty(rows, width)) if rows else None
        self.skip_gates = (
            nn.Parameter(torch.empty(rows, width)) if rows * config.skip_gates else None
        )
        self.embed = EmbedRegion()
        self.skip = SkipRegion()
        self.head = HeadRegion(config.logit_softcap)
        self._rope: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def regions(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the parts that are compiled, each as one graph, in execution order."""
        yield "embed", self.embed
        for index, block in enumerate(self.blocks):
            yield f"blocks.{index}", block
        yield "skip", self.skip
        yield "head", self.head

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        phase: int = 0,
        taps: Sequence[int] = (),
        cache: KVCache | None = None,
    ) -> Output:
        """Run one pass over the model.

        Args:
            tokens_BT: int64 input ids.
            targets_BT: int64 ids to predict; without them the logits are returned.
            weight: float32 weight in the loss sum of every row, [B] (0 for padding rows), or of
                every target, [B, T].
            phase: Recurrence phase 0, 1 or 2.
            taps: Layers whose states to return, in this order: -1 for the final pre-norm state
                (the same tensor that the head reads), i for block i's output at its last execution,
                ``EMBEDDED`` for the embedded tokens.
            cache: Keys and values of the positions before ``tokens_BT``; the pass appends its own.
                For generation: eager, without gradients, on an unsharded model.
        """
        x_BTD = self.embed(tokens_BT, self.tok_emb.weight, _weight(self.embed_proj))
        if cache is None:
            x_BTD, states = self._run_blocks(x_BTD, self.places(tokens_BT), phase, taps)
        else:
            with cache.extended(self, tokens_BT, phase) as places:
                x_BTD, states = self._run_blocks(x_BTD, places, phase, taps)
        result = self.head(x_BTD, *self.output_layer(), targets_BT, weight)
        if targets_BT is None:
            return Output(logits_BTV=result, taps=states)
        loss, row_loss_B = result if isinstance(result, tuple) else (result, None)
        return Output(loss_sum=loss, row_loss_B=row_loss_B, taps=states)

    def output_layer(self) -> OutputLayer:
        """Return the matrices that the head reads; sharded outside of the root's forward."""
        head = self.tok_emb if self.lm_head is None else self.lm_head
        return OutputLayer(head.weight, _weight(self.head_proj))

    def places(self, tokens_BT: Tensor, length: int | None = None) -> Places:
        """Return where the positions of rows are.

        Args:
            tokens_BT: The rows from their beginning on.
            length: Length of the complete rows, if more tokens follow.

        Raises:
            ValueError: the model masks documents, but has no ``bos_id``.
        """
        count = tokens_BT.size(1)
        cos_TR, sin_TR = self._rope_tables(length or count, tokens_BT.device)
        if length is not None:
            cos_TR, sin_TR = cos_TR[:count], sin_TR[:count]
        if not self.config.document_mask:
            return Places(cos_TR, sin_TR, None)
        if self.bos_id is None:
            raise ValueError("model.document_mask=true: needs the id that begins a document")
        return places_in_documents(
            tokens_BT == self.bos_id, cos_TR, sin_TR, reset=self.config.reset_positions
        )

    def _run_blocks(
        self, x_BTD: Tensor, places: Places, phase: int, taps: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run encoder and decoder with skips; return the final state and the tapped ones."""
        order = execution_order(self.config, phase)
        x0_BTD = _distinct(x_BTD) if self.config.x0_mix else None
        states: dict[int, Tensor] = {EMBEDDED: x_BTD}

        def run(x_BTD: Tensor, execution: Execution) -> Tensor:
            block = self.blocks[execution.block]
            assert isinstance(block, Block)
            mlp = block.mlp_of_repeat(execution.repeat)
            x_BTD = block(x_BTD, x0_BTD, places.cos, places.sin, mlp, places.documents_BT)
            if execution.block in taps and execution.is_last:
                states[execution.block] = x_BTD
            return x_BTD

        stack: list[Tensor] = []
        for execution in order.encoder:
            x_BTD = run(x_BTD, execution)
            stack.append(_distinct(x_BTD))
        for row, execution in enumerate(order.decoder):
            if self.skip_weights is not None and stack:
                gate = None if self.skip_gates is None else self.skip_gates[row]
                x_BTD = self.skip(x_BTD, stack.pop(), self.skip_weights[row], gate)
            x_BTD = run(x_BTD, execution)
        states[-1] = x_BTD
        return x_BTD, tuple(states[layer] for layer in taps)

    def _rope_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (length, device)
        if key not in self._rope:
            self._rope[key] = rope_tables(self.config, length, device)
        return self._rope[key]


def _distinct(x: Tensor) -> Tensor:
    """Return the same values as another tensor object: a region that gets one tensor twice is
    compiled to a separate graph."""
    return x.view_as(x)


def _weight(linear: nn.Linear | None) -> Tensor | None:
    return None if linear is None else linear.weight
