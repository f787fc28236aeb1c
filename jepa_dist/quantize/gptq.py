"""GPTQ with scales from the rows' spread and, optionally, their importance (golden README section
7).

A matrix [rows, columns] computes y = W x. Columns are rounded one after the other, and the error of
each is compensated in the remaining columns, such that the error of y is small for the calibration
inputs: their Hessian is the sum of x x^T. Everything is computed in float64, so that the result
does not depend on the order of a library's sums.

Tensor names carry their shape: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_dist.errors import UserError

_DAMPING = 0.01
_SMALLEST_SCALE = 1e-10
# Columns whose errors are compensated one by one; later columns are updated by one product.
_BLOCK = 128


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integers and one scale per row; their product is the matrix."""

    q_RC: Tensor
    """int8."""
    scale_R: Tensor
    """float16; 0 for a row of zeros."""

    def dequantize(self) -> Tensor:
        """Return the matrix, float32 [R, C]."""
        return self.q_RC.float() * self.scale_R.float()[:, None]


def quantize_matrix(
    weight_RC: Tensor,
    hessian_CC: Tensor,
    *,
    bits: int,
    clip_sigmas: float,
    hessian_clip_lambda: float,
) -> QuantizedMatrix:
    """Return the matrix rounded to integers of ``bits`` bits, on the CPU.

    Args:
        weight_RC: The matrix.
        hessian_CC: Sum of x x^T over its inputs, times any factor.
        bits: 2 to 8; integers are -(2**(bits-1) - 1) to 2**(bits-1) - 1.
        clip_sigmas: Half the range of a row, in standard deviations of the row.
        hessian_clip_lambda: Effect of a row's importance on its range; 0: none.

    Raises:
        UserError: weights or inputs are not finite, or a row's scale exceeds float16.
    """
    weight_RC, hessian_CC = weight_RC.double(), hessian_CC.double()
    if not (weight_RC.isfinite().all() and hessian_CC.isfinite().all()):
        raise UserError("cannot be quantized: weights or calibration inputs are not finite")
    limit = 2 ** (bits - 1) - 1
    diagonal_C = hessian_CC.diagonal()
    dead_C = diagonal_C == 0
    damped_CC = hessian_CC + torch.diag(dead_C.double())
    damped_CC += _DAMPING * damped_CC.diagonal().mean() * torch.eye(len(dead_C)).to(damped_CC)
    scale_R = _scales(weight_RC, damped_CC.diagonal(), limit, clip_sigmas, hessian_clip_lambda)
    order_C = torch.argsort(damped_CC.diagonal(), descending=True, stable=True)
    ordered_CC = damped_CC[order_C][:, order_C]
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(ordered_CC))
    upper_CC = torch.linalg.cholesky(inverse_CC, upper=True)
    working_RC = weight_RC.masked_fill(dead_C, 0.0)[:, order_C]
    rounded_RC = _round_columns(working_RC, upper_CC, scale_R.double(), limit)
    q_RC = torch.empty_like(rounded_RC).index_copy_(1, order_C, rounded_RC)
    return QuantizedMatrix(q_RC.to(torch.int8).cpu(), scale_R.cpu())


def _scales(
    weight_RC: Tensor, diagonal_C: Tensor, limit: int, clip_sigmas: float, clip_lambda: float
) -> Tensor:
    """Return one scale per row, float16 [R], from all columns, including dead ones."""
    scale_R = (clip_sigmas * weight_RC.std(dim=1) / limit).clamp(min=_SMALLEST_SCALE)
    if clip_lambda > 0:
        importance_R = (weight_RC.abs() * (diagonal_C / diagonal_C.mean())).mean(dim=1)
        mean = importance_R.mean().clamp(min=torch.finfo(torch.float64).tiny)
        # A large lambda must not make a range negative; the reference's never does.
        factor_R = (1.0 + clip_lambda * (importance_R / mean - 1.0)).clamp(min=0.0)
        scale_R = scale_R * factor_R
    # Via float32, in which the reference computes it.
    half_R = scale_R.float().half()
    if not half_R.isfinite().all():
        raise UserError(
            f"cannot be quantized: a row needs a scale of {scale_R.max().item():.3g}, more than "
            f"float16 holds ({torch.finfo(torch.float16).max:.0f})"
        )
    return half_R


def _round_columns(working_RC: Tensor, upper_CC: Tensor, scale_R: Tensor, limit: int) -> Tensor:
    """Return integers as float64 [R, C], column by column; modifies ``working_RC``."""
    rounded_RC = torch.zeros_like(working_RC)
    # A row whose scale is 0 becomes zeros.
    inverse_R = torch.where(scale_R > 0, 1.0 / scale_R, torch.zeros_like(scale_R))
    count = working_RC.size(1)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors_RK = torch.zeros_like(working_RC[:, start:end])
        for column in range(start, end):
            value_R = working_RC[:, column]
            q_R = (value_R * inverse_R).round().clamp(-limit, limit)
            error_R = (value_R - q_R * scale_R) / upper_CC[column, column]
            working_RC[:, column:end] -= torch.outer(error_R, upper_CC[column, column:end])
            rounded_RC[:, column] = q_R
            errors_RK[:, column - start] = error_R
        working_RC[:, end:] -= errors_RK @ upper_CC[start:end, end:]
    return rounded_RC
