"""The head: final norm, output projection, soft cap and cross-entropy.

Large logits are never materialized at once: the rows are processed in chunks, and a chunk's
gradients are computed right after its loss, while its logits exist. Nothing is computed twice;
saved for backward are one gradient of the states and one of the projection, instead of several
copies of the logits. docs/performance.md has the figures.

Tensor names carry their shape: N rows (B * T flattened), D model width, E embedding width,
V vocabulary; B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.model.layers import rms_norm

# Limits from which chunks pay off (bench head); below, the logits are small relative to the other
# activations. Chunks are unrolled in the compiled graph, so their number is bounded: eight take
# seconds to compile, and more would save little.
_SMALLEST_VOCAB = 1024
_FEWEST_LOGITS = 2**21
_FEWEST_ROWS = 256
_MOST_CHUNKS = 8


def num_chunks(rows: int, vocab_size: int) -> int:
    """Return the number of chunks of rows; 1 if chunks would not pay off."""
    if vocab_size < _SMALLEST_VOCAB:
        return 1
    fitting = min(rows // _FEWEST_ROWS, rows * vocab_size // _FEWEST_LOGITS)
    return max(1, min(fitting, _MOST_CHUNKS))


class HeadRegion(nn.Module):
    """Final norm, output projection, soft cap, and cross-entropy if targets are given.

    Has no parameters of its own: a tied embedding belongs to the root. With ``by_row`` a pass with
    gradients returns each row's share of the loss, too: another output of the compiled graph.
    """

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.softcap = softcap
        self.by_row = False

    def forward(
        self,
        x_BTD: Tensor,
        head_VE: Tensor,
        proj_ED: Tensor | None,
        targets_BT: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the weighted loss sum (float32 scalar); without targets, the logits [B, T, V].

        With ``by_row`` also the part of each row, float32 [B], detached.
        """
        y = rms_norm(x_BTD)
        y = y if proj_ED is None else F.linear(y, proj_ED)
        if targets_BT is None or weight is None:
            return capped_logits(y, head_VE, self.softcap)
        # [B] becomes [B, 1]; [B, T] is unchanged.
        weight_BT = weight.view(len(weight), -1).expand_as(targets_BT)
        rows = Rows(y.flatten(0, 1), targets_BT.flatten(), weight_BT.flatten())
        chunks = num_chunks(targets_BT.numel(), len(head_VE))
        if self.by_row and torch.is_grad_enabled():
            loss, loss_N = loss_by_position(rows, head_VE, self.softcap, chunks)
            return loss, loss_N.detach().view_as(targets_BT).sum(1)
        if chunks == 1:
            return loss_sum(rows, head_VE, self.softcap)
        return chunked_loss_sum(rows, head_VE, self.softcap, chunks)


class Rows(NamedTuple):
    """Inputs of the loss, one row per position."""

    y_NE: Tensor
    """Normalized states, in the activations' dtype."""
    targets_N: Tensor
    """Target token ids, int64."""
    weight_N: Tensor
    """float32 weight of each row in the sum."""

    def chunks(self, number: int) -> Iterator[Rows]:
        """Yield the rows in at most this many chunks of nearly equal size."""
        pieces = (tensor.chunk(number) for tensor in self)
        return (Rows(*piece) for piece in zip(*pieces, strict=True))


def capped_logits(y: Tensor, head_VE: Tensor, softcap: float) -> Tensor:
    """Return the logits after the soft cap (0: none), float32 [..., V]."""
    logits = F.linear(y, head_VE).float()
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def loss_sum(rows: Rows, head_VE: Tensor, softcap: float) -> Tensor:
    """Return the weighted sum of cross-entropy over the rows (float32 scalar); materializes all
    logits."""
    return _weighted_loss(rows, head_VE, softcap).sum()


def _weighted_loss(rows: Rows, head_VE: Tensor, softcap: float) -> Tensor:
    """Return the weighted cross-entropy of each row, float32 [N]."""
    logits_NV = capped_logits(rows.y_NE, head_VE, softcap)
    nll_N = F.cross_entropy(logits_NV, rows.targets_N, reduction="none")
    return nll_N * rows.weight_N


def chunked_loss_sum(rows: Rows, head_VE: Tensor, softcap: float, chunks: int) -> Tensor:
    """Return the same sum as ``loss_sum``, with the logits of one chunk at a time."""
    if torch.is_grad_enabled():
        loss: Tensor = _LossWithGradients.apply(*rows, head_VE, softcap, chunks, False)
        return loss
    return torch.stack([loss_sum(chunk, head_VE, softcap) for chunk in rows.chunks(chunks)]).sum()


def loss_by_position(
    rows: Rows, head_VE: Tensor, softcap: float, chunks: int
) -> tuple[Tensor, Tensor]:
    """Return the same sum, and its parts, float32 [N], which must not be differentiated."""
    if chunks == 1:
        loss_N = _weighted_loss(rows, head_VE, softcap)
        return loss_N.sum(), loss_N
    both: tuple[Tensor, Tensor] = _LossWithGradients.apply(*rows, head_VE, softcap, chunks, True)
    return both


class _LossWithGradients(torch.autograd.Function):
    """A loss whose forward computes the gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NE: Tensor,
        targets_N: Tensor,
        weight_N: Tensor,
        head_VE: Tensor,
        softcap: float,
        chunks: int,
        by_position: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        losses, parts, grads_y = [], [], []
        # float32, because in bfloat16 rounding would lose contributions of later chunks.
        grad_head_VE = torch.zeros_like(head_VE, dtype=torch.float32)
        for chunk in Rows(y_NE, targets_N, weight_N).chunks(chunks):
            loss, loss_N1, grad_logits_NV = _loss_and_gradient(chunk, head_VE, softcap)
            losses.append(loss)
            parts.append(loss_N1)
            grads_y.append(grad_logits_NV @ head_VE)
            grad_head_VE += grad_logits_NV.T @ chunk.y_NE
        ctx.save_for_backward(torch.cat(grads_y), grad_head_VE)
        total = torch.stack(losses).sum()
        return (total, torch.cat(parts).squeeze(1)) if by_position else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # Scale in float32: a factor such as 1 / tokens of the global batch is inexact in bfloat16.
        grad_y_NE, grad_head_VE = ctx.saved_tensors
        dtype = grad_y_NE.dtype
        grad_y_NE = (grad_y_NE.float() * grad).to(dtype)
        grad_head_VE = (grad_head_VE * grad).to(dtype)
        return grad_y_NE, None, None, grad_head_VE, None, None, None


def _loss_and_gradient(
    rows: Rows, head_VE: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss sum of the rows, its parts [N, 1], and its gradient with respect to the
    uncapped logits, [N, V] in the states' dtype."""
    logits_NV = capped_logits(rows.y_NE, head_VE, softcap)
    log_sum_N1 = torch.logsumexp(logits_NV, dim=1, keepdim=True)
    targets_N1, weight_N1 = rows.targets_N[:, None], rows.weight_N[:, None]
    loss_N1 = weight_N1 * (log_sum_N1 - logits_NV.gather(1, targets_N1))
    loss = loss_N1.sum()
    # A comparison instead of a scatter, because the compiler can fuse it.
    is_target_NV = torch.arange(len(head_VE), device=logits_NV.device) == targets_N1
    grad_NV = weight_N1 * (torch.exp(logits_NV - log_sum_N1) - is_target_NV.float())
    if softcap > 0:
        grad_NV = grad_NV * (1 - (logits_NV / softcap).square())  # tanh' = 1 - tanh^2
    return loss, loss_N1, grad_NV.to(rows.y_NE.dtype)
