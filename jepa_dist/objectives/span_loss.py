"""The span loss: hidden states at the ends of a span must move linearly.

    context = (h[a-1] - h[0]) + (h[T-1] - h[b])
    patch   =  h[b] - h[a-1]
    loss    =  1 - cos(context, patch)

Source: Semantic Tube Prediction (arXiv 2602.22617) as released (``random_span`` over the whole
row), proposed for pre-training in parameter-golf issue #1772. Derivations: docs/objective.md.

Tensor names carry their shape: B batch, T sequence, D model width, S spans of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_dist.objectives.cosine import at_least_float32, row_floor

# Expected loss of unstructured (i.i.d.) states: context and patch share h[a-1] and h[b] with
# opposite sign, so cos = -2 / (sqrt(4) * sqrt(2)) = -1/sqrt(2).
UNSTRUCTURED_LOSS = 1.0 + 0.5**0.5


def span_loss(
    h_BTD: Tensor, spans_BS2: Tensor, weight_B: Tensor, norm_floor: float
) -> tuple[Tensor, Tensor]:
    """Return the loss summed over the given sequences; no communication.

    Args:
        h_BTD: Hidden states, any floating dtype (computed in at least float32).
        spans_BS2: int64 spans (a, b), legal as in ``objectives.spans``.
        weight_B: float32 weight of each row (0 for padding).
        norm_floor: See ``span_cosines``.

    Returns:
        Row weight times the mean loss over the row's spans, summed: scalar, at least float32. And
        the number of spans of which a norm hit the floor, float32 scalar (detached).
    """
    cosine_BS, floored_BS = span_cosines(h_BTD, spans_BS2, norm_floor)
    loss_B = (1.0 - cosine_BS).mean(dim=1)
    return (weight_B * loss_B).sum(), (weight_B[:, None] * floored_BS).sum()


def span_cosines(h_BTD: Tensor, spans_BS2: Tensor, norm_floor: float) -> tuple[Tensor, Tensor]:
    """Return cos(context, patch) of every span, and whether one of its norms hit the floor.

    Each norm is floored separately at ``norm_floor`` times the RMS norm of the sequence's states
    (detached; taken per sequence, so that the loss of a sequence does not depend on its
    neighbors), or at an absolute 1e-8 if ``norm_floor`` is 0. Without the relative floor, a span
    between two equal states has an exactly zero patch and a gradient of order 1e6.

    Returns:
        [B, S] cosines (float32, or float64 for float64 states) and [B, S] float 0/1.
    """
    context_BSD, patch_BSD = context_and_patch(h_BTD, spans_BS2)
    floor_B1 = row_floor(h_BTD, norm_floor)
    context_norm_BS = torch.linalg.vector_norm(context_BSD, dim=-1)
    patch_norm_BS = torch.linalg.vector_norm(patch_BSD, dim=-1)
    unit_context_BSD = context_BSD / torch.maximum(context_norm_BS, floor_B1).unsqueeze(-1)
    unit_patch_BSD = patch_BSD / torch.maximum(patch_norm_BS, floor_B1).unsqueeze(-1)
    floored_BS = torch.minimum(context_norm_BS, patch_norm_BS).detach() < floor_B1
    return (unit_context_BSD * unit_patch_BSD).sum(-1), floored_BS.float()


def context_and_patch(h_BTD: Tensor, spans_BS2: Tensor) -> tuple[Tensor, Tensor]:
    """Return context and patch vectors, [B, S, D] each, in at least float32.

    Their sum is always ``h[T-1] - h[0]``. The few states needed are gathered before the cast; the
    differences come first, so a common offset of all states cancels.
    """
    before_BSD = _gather(h_BTD, spans_BS2[..., 0] - 1)
    end_BSD = _gather(h_BTD, spans_BS2[..., 1])
    first_B1D, last_B1D = at_least_float32(h_BTD[:, :1]), at_least_float32(h_BTD[:, -1:])
    context_BSD = (before_BSD - first_B1D) + (last_B1D - end_BSD)
    return context_BSD, end_BSD - before_BSD


def _gather(h_BTD: Tensor, positions_BS: Tensor) -> Tensor:
    index_BSD = positions_BS.unsqueeze(-1).expand(-1, -1, h_BTD.size(-1))
    return at_least_float32(torch.gather(h_BTD, 1, index_BSD))
