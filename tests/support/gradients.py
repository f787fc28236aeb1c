"""Gradients of a model against those of a golden case."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_dist.interop import parameter_golf
from jepa_dist.model.gpt import GPT


def assert_gradients_match(model: GPT, expected: dict[str, Tensor]) -> None:
    """Assert that the gradients are those of the reference, by the reference's names."""
    ours = {parameter_golf.to_reference_name(n): p.grad for n, p in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, reference in expected.items():
        gradient = torch.zeros_like(reference) if ours[name] is None else ours[name]
        limit = max(2e-6, 1e-4 * reference.norm().item())
        error = (gradient - reference).abs().max().item()
        assert error <= limit, f"{name}: off by {error}"
