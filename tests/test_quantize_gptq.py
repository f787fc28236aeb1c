"""GPTQ and the choice of precision: exactly the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jepa_dist.config import ModelConfig, QuantizationConfig
from jepa_dist.errors import UserError
from jepa_dist.interop.parameter_golf import from_reference_name
from jepa_dist.quantize.gptq import quantize_matrix
from jepa_dist.quantize.policy import Precision, precisions
from tests.support.golden_cases import Case, cases


@pytest.mark.parametrize("case", cases("gptq"))
def test_integers_and_scales_equal_the_reference(case: Case) -> None:
    arrays = case.tensors()
    assert case.info["cases"]
    for name, about in case.info["cases"].items():
        keys = ("bits", "clip_sigmas", "hessian_clip_lambda")
        options = {key: about["settings"][key] for key in keys}
        found = quantize_matrix(arrays[f"{name}/w"], arrays[f"{name}/H"], **options)
        assert torch.equal(found.q_RC, arrays[f"{name}/q"]), name
        assert torch.equal(found.scale_R, arrays[f"{name}/scale"]), name
        assert torch.equal(found.dequantize(), arrays[f"{name}/dequantised"]), name


def unblocked(weight: torch.Tensor, hessian: torch.Tensor, limit: int, sigmas: float) -> Any:
    """Quantize column by column by the golden README's rule, without Hessian-aware scales."""
    w, h = weight.double().clone(), hessian.double().clone()
    scale = (sigmas * w.std(dim=1) / limit).float().half()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).T
    q = torch.zeros_like(w)
    for j in range(w.size(1)):
        q[:, j] = (w[:, j] / scale.double()).round().clamp(-limit, limit)
        error = (w[:, j] - q[:, j] * scale.double()) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    back = order.argsort()
    return q[:, back].to(torch.int8), scale


def test_blocked_quantization_equals_unblocked() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 300, generator=generator)
    inputs = torch.randn(700, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    hessian = (inputs.T @ inputs).double()
    found = quantize_matrix(weight, hessian, bits=4, clip_sigmas=2.5, hessian_clip_lambda=0.0)
    q, scale = unblocked(weight, hessian, 7, 2.5)
    assert torch.equal(found.q_RC, q)
    assert torch.equal(found.scale_R, scale)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    found = quantize_matrix(
        weight, torch.eye(4), bits=6, clip_sigmas=3.0, hessian_clip_lambda=0.175
    )
    assert found.scale_R[[0, 2]].tolist() == [0.0, 0.0]
    assert found.dequantize()[[0, 2]].abs().sum() == 0
    assert (found.dequantize()[1] - weight[1]).abs().max() <= found.scale_R[1] / 2 + 1e-6
    nothing = quantize_matrix(
        torch.zeros(2, 4), torch.zeros(4, 4), bits=6, clip_sigmas=3.0, hessian_clip_lambda=0.175
    )
    assert nothing.dequantize().abs().sum() == 0


def test_what_cannot_be_quantized_is_refused() -> None:
    options = {"bits": 6, "clip_sigmas": 12.85, "hessian_clip_lambda": 0.0}
    for weight, problem in (
        (torch.full((2, 3), torch.nan), "not finite"),
        (torch.tensor([[1e7, -1e7, 0.0]]), "more than float16 holds"),
    ):
        with pytest.raises(UserError, match=problem):
            quantize_matrix(weight, torch.eye(3), **options)


@pytest.mark.parametrize("case", cases("quantpolicy"))
def test_precisions_equal_the_reference(case: Case) -> None:
    arrays = case.arrays()
    assert case.info["cases"]
    for label, about in case.info["cases"].items():
        settings = dict(about["settings"])
        loop = {key: settings.pop(key) for key in ("loop_start", "loop_end")}
        model = ModelConfig(num_layers=64, num_loops=1, **loop)
        known = {k: v for k, v in settings.items() if k in QuantizationConfig.model_fields}
        limits = dict(
            zip(arrays[f"{label}/names"], arrays[f"{label}/clip_range"].tolist(), strict=True)
        )
        sigmas = dict(zip(arrays[f"{label}/names"], arrays[f"{label}/clip_sigmas"], strict=True))
        # The reference's sizes are not in the file: what it quantizes counts as large.
        sizes = {ours(name): 65537 if limit else 65536 for name, limit in limits.items()}
        found = precisions(sizes, model, QuantizationConfig(**known))
        expected = {
            ours(name): Precision(int(np.log2(limit + 1)) + 1, pytest.approx(sigmas[name]))
            for name, limit in limits.items()
            if limit
        }
        assert found == expected, label


def ours(name: str) -> str:
    return from_reference_name(str(name))
