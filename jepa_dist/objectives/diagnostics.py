"""Diagnostics of the objective, computed from the tapped states: is it active, is it a short-cut?

docs/objective.md explains them, with values for states of known kinds. Everything is computed in
float32 on the states' device, asynchronously except for the eigenvalues, whose solver synchronizes
to check convergence.

Tensor names carry their shape: B batch, T sequence, D model width, L span lengths, P places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_dist.objectives.span_loss import span_cosines

_TINY = 1e-30
# States that differ by less than this fraction of their norm differ by rounding.
_ROUNDING = 1e-6


def gradient_products(objective: Tensor, total: Tensor) -> dict[str, Tensor]:
    """Return products of the gradients of lambda * JEPA and cross-entropy at the tapped state.

    Args:
        objective: Gradient of lambda * JEPA with respect to the tapped states, any shape.
        total: Gradient of the whole loss, of the same shape; cross-entropy's is the difference.

    Returns:
        ``jepa_sq`` and ``ce_sq``, the squared norms, and ``dot``, the inner product; float32
        scalars that add up over micro-batches and ranks.
    """
    objective, total = objective.float(), total.float()
    ce = total - objective
    return {
        "jepa_sq": objective.square().sum(),
        "ce_sq": ce.square().sum(),
        "dot": (objective * ce).sum(),
    }


def describe_states(h_BTD: Tensor) -> dict[str, Tensor]:
    """Return spread and motion of the tapped states; float32 scalars by name.

    All but ``straightness`` omit the state at position 0: as an attention sink it can outweigh the
    others (see ``sink_share``).
    """
    h_BTD = h_BTD.float()
    later_BTD = h_BTD[:, 1:]
    mean_D = later_BTD.mean((0, 1))
    centered_BTD = later_BTD - mean_D
    energy = later_BTD.square().sum(-1).mean()
    return {
        **_ranks(centered_BTD, energy),
        "mean_cosine": mean_pairwise_cosine(h_BTD),
        "std": centered_BTD.square().mean((0, 1)).sqrt().mean(),
        "mean_share": mean_D.square().sum() / energy.clamp_min(_TINY),
        "clock_share": _clock_share(centered_BTD),
        "straightness": _straightness(h_BTD),
    }


def effective_rank(h_BTD: Tensor) -> Tensor:
    """Return the effective rank of states, as in ``describe_states``; float32 scalar."""
    later_BTD = h_BTD[:, 1:].float()
    energy = later_BTD.square().sum(-1).mean()
    return _ranks(later_BTD - later_BTD.mean((0, 1)), energy)["effective_rank"]


def mean_pairwise_cosine(h_BTD: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of states (without position 0), float32 scalar.

    Anisotropy: 0 for directions without a preference, 1 if all states point one way. The squared
    norm of the sum of N unit vectors is N plus the sum of all pairs' cosines.
    """
    unit_ND = torch.nn.functional.normalize(h_BTD[:, 1:].float().flatten(0, 1), dim=-1, eps=_TINY)
    count = len(unit_ND)
    return (unit_ND.sum(0).square().sum() - count) / max(1, count * (count - 1))


def _ranks(centered_BTD: Tensor, energy: Tensor) -> dict[str, Tensor]:
    """Return how many directions the states use, by the eigenvalues' shares p of the variance.

    Effective rank: exp of the entropy of p (Roy and Vetterli 2007). Participation ratio:
    1 / sum p^2. Both are D for a round cloud and 1 for a line or a point.
    """
    states_ND = centered_BTD.flatten(0, 1)
    covariance_DD = states_ND.T @ states_ND / len(states_ND)
    eigenvalues_D = _eigenvalues(covariance_DD, _ROUNDING**2 * energy) + 0 * energy
    is_real_D = eigenvalues_D > _ROUNDING**2 * energy
    eigenvalues_D = eigenvalues_D * is_real_D
    eigenvalues_D[-1] += _TINY  # of a point: one direction, not 0/0
    p_D = eigenvalues_D / eigenvalues_D.sum()
    return {
        "effective_rank": torch.special.entr(p_D).sum().exp(),
        "participation_ratio": 1 / p_D.square().sum(),
    }


def _eigenvalues(covariance_DD: Tensor, rounding: Tensor) -> Tensor:
    """Return the eigenvalues in ascending order.

    Zeros for a matrix that holds only rounding errors; NaN if LAPACK's iteration does not converge,
    since a diagnostic must not end a run.
    """
    scale = covariance_DD.diagonal().sum()
    # LAPACK raises on non-finite values; the energy makes the result NaN then.
    matrix_DD = (covariance_DD / scale.clamp_min(_TINY)).nan_to_num(0, 0, 0)
    matrix_DD = torch.where(scale > rounding, matrix_DD, torch.zeros_like(matrix_DD))
    try:
        return torch.linalg.eigvalsh(matrix_DD) * scale
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.full_like(matrix_DD[0], torch.nan)


def _clock_share(centered_BTD: Tensor) -> Tensor:
    """Return the share of the variance along the direction that best fits the position, for all
    rows."""
    num_rows, length, _ = centered_BTD.shape
    time_T = torch.arange(length, device=centered_BTD.device, dtype=torch.float32)
    time_T = time_T - time_T.mean()
    time_energy = num_rows * time_T.square().sum()
    slope_D = torch.einsum("btd,t->d", centered_BTD, time_T) / time_energy.clamp_min(_TINY)
    explained = slope_D.square().sum() * time_energy
    return explained / centered_BTD.square().sum().clamp_min(_TINY)


def _straightness(h_BTD: Tensor) -> Tensor:
    """Return |h[T-1] - h[0]| over the length of the path between them, mean over rows."""
    direct_B = torch.linalg.vector_norm(h_BTD[:, -1] - h_BTD[:, 0], dim=-1)
    way_B = torch.linalg.vector_norm(h_BTD.diff(dim=1), dim=-1).sum(1)
    return (direct_B / way_B.clamp_min(_TINY)).mean()


def sink_share(h_BTD: Tensor, spans_BS2: Tensor) -> Tensor:
    """Return the share of the context due to h[0], float32 scalar.

    The share of h[0] in the squared distances of the context's four states (0, a-1, b, T-1) from
    the mean of their row (without position 0): 1/4 if it is like the others, 1 if the others are
    at the mean.
    """
    h_BTD = h_BTD.float()
    distance_BT = (h_BTD - h_BTD[:, 1:].mean(1, keepdim=True)).square().sum(-1)
    before_BS = distance_BT.gather(1, spans_BS2[..., 0] - 1)
    end_BS = distance_BT.gather(1, spans_BS2[..., 1])
    sink_B, last_B = distance_BT[:, 0], distance_BT[:, -1]
    others = last_B.sum() + (before_BS + end_BS).mean(1).sum()
    return sink_B.sum() / (sink_B.sum() + others).clamp_min(_TINY)


def document_share(h_BTD: Tensor, documents_BT: Tensor) -> Tensor:
    """Return the share of the variance inside rows that is between their documents, float32 scalar.

    The fraction of the squared distances of the states (without position 0) from the mean of their
    row that remains if each state is replaced by the mean of its document.

    Args:
        h_BTD: Tapped states.
        documents_BT: int64 number of the document of each position, from 0 up to T.
    """
    h_BTD, documents_BT = h_BTD[:, 1:].float(), documents_BT[:, 1:]
    centered_BTD = h_BTD - h_BTD.mean(1, keepdim=True)
    rows, length, width = centered_BTD.shape
    # There are at most as many documents as positions; most of these sums stay empty.
    sums = centered_BTD.new_zeros(rows, length + 2, width)
    sums.scatter_add_(1, documents_BT[..., None].expand_as(centered_BTD), centered_BTD)
    counts = centered_BTD.new_zeros(rows, length + 2)
    counts.scatter_add_(1, documents_BT, torch.ones_like(documents_BT, dtype=torch.float32))
    between = (sums.square().sum(-1) / counts.clamp_min(1)).sum()
    return between / centered_BTD.square().sum().clamp_min(_TINY)


def cosine_table(h_BTD: Tensor, grid_LP2: Tensor) -> Tensor:
    """Return cos(context, patch) of every row on a grid of spans, [B, L, P] float32.

    Norms are not floored as in the loss: on a straight line it is 1 even for the shortest patch.
    Between equal states it is 0.
    """
    spans_BS2 = grid_LP2.flatten(0, 1).expand(len(h_BTD), -1, -1)
    cosine_BS, _ = span_cosines(h_BTD.float(), spans_BS2, norm_floor=0.0)
    return cosine_BS.view(-1, *grid_LP2.shape[:2])


def loss_by_documents(
    cosine_BLP: Tensor, grid_LP2: Tensor, documents_BT: Tensor
) -> dict[str, Tensor]:
    """Return the loss of spans inside one document and of those that cross documents, by length.

    By length, because long spans cross more often: plain means would also differ by length.

    Args:
        cosine_BLP: From ``cosine_table``.
        grid_LP2: Its spans.
        documents_BT: int64 number of the document that each position belongs to.

    Returns:
        ``within_loss``, ``within_count``, ``cross_loss``, ``cross_count``: sums and numbers of
        spans, float32 [L]; they add up over ranks.
    """
    spans_BS2 = grid_LP2.flatten(0, 1).expand(len(documents_BT), -1, -1)
    before_BS = documents_BT.gather(1, spans_BS2[..., 0] - 1)
    end_BS = documents_BT.gather(1, spans_BS2[..., 1])
    within_BLP = (before_BS == end_BS).view_as(cosine_BLP).float()
    loss_BLP = 1 - cosine_BLP
    return {
        "within_loss": (within_BLP * loss_BLP).sum((0, 2)),
        "within_count": within_BLP.sum((0, 2)),
        "cross_loss": ((1 - within_BLP) * loss_BLP).sum((0, 2)),
        "cross_count": (1 - within_BLP).sum((0, 2)),
    }
