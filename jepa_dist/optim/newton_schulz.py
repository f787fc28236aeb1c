"""Newton-Schulz iteration: moves all singular values of a matrix to 1 by matrix products only.

Fixed coefficients: K. Jordan, "Muon" (https://kellerjordan.github.io/posts/muon/); by design the
iteration ends near 1, not at it. Polar Express: N. Amsel et al., arXiv 2505.16932, coefficients
that differ per iteration. Both as in golden README section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

FIXED: Coefficients = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS: Coefficients = (
    (8.237312490495558, -23.157747414558205, 16.680568411445918),
    (4.082441999064834, -2.893047735332586, 0.525284925697565),
    (3.926347992254655, -2.854746803476530, 0.531802242289499),
    (3.298218713308514, -2.424541981026706, 0.486320083588441),
    (2.320007312889811, -1.686216972996763, 0.420680273402352),
)

_EPS = 1e-7


def cost(rows: int, cols: int) -> int:
    """Multiply-adds of one iteration on a matrix of this shape; the same for its transpose."""
    short, long = sorted((rows, cols))
    return short * short * (2 * long + short)


def orthogonalize(
    matrices: Sequence[Tensor],
    table: Coefficients,
    steps: int,
    dtype: torch.dtype,
    result_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return the orthogonalized matrices, in order; one batched iteration per shape.

    A tall matrix is iterated as its transpose and shares a batch with wide ones of that shape.

    Args:
        matrices: 2-D tensors of any shapes on one device.
        table: Coefficients (a, b, c) per iteration; the last row is used for all further ones.
        steps: Number of iterations.
        dtype: Dtype of the iteration.
        result_dtype: Dtype of the results, which are contiguous; None: that of the iteration.
    """
    batches: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, cols = matrix.shape
        batches.setdefault((min(rows, cols), max(rows, cols)), []).append(index)
    results: dict[int, Tensor] = {}
    for members in batches.values():
        stacked = torch.stack([_wide(matrices[index]) for index in members]).to(dtype)
        wide_BSL = _iterate(stacked, table, steps).to(result_dtype or dtype)
        # One copy for the batch; with transposed views, callers would copy each matrix.
        are_tall = [_is_tall(matrices[index]) for index in members]
        tall_BLS = wide_BSL.mT.contiguous() if any(are_tall) else wide_BSL
        for place, (index, is_tall) in enumerate(zip(members, are_tall, strict=True)):
            results[index] = (tall_BLS if is_tall else wide_BSL)[place]
    return [results[index] for index in range(len(matrices))]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def _iterate(x_BSL: Tensor, table: Coefficients, steps: int) -> Tensor:
    """Run ``steps`` iterations on a batch of S x L matrices, S <= L, which is overwritten."""
    norm = torch.linalg.vector_norm(x_BSL, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x_BSL /= norm + _EPS
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram_BSS = x_BSL @ x_BSL.mT
        polynomial_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        x_BSL = torch.baddbmm(x_BSL, polynomial_BSS, x_BSL, beta=a)
    return x_BSL
