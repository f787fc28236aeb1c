"""What activation checkpointing recomputes, counted by operation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_dist.config import ModelConfig
from jepa_dist.model.layers import Block, rope_tables
from jepa_dist.parallel.shard import checkpoint_activations

# q, k, v, output projection, two of the MLP; each has two products in its backward.
PRODUCTS = 4  # q, k and v in one; output; and the two of the MLP


class Calls(TorchDispatchMode):
    """Counts operations by name, without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def gradients(mode: str) -> tuple[Counter[str], list[torch.Tensor]]:
    """Run one pass of a block; return the calls of its backward, and the gradients."""
    torch.manual_seed(0)
    config = ModelConfig(model_dim=32, num_heads=4, num_kv_heads=2, seq_len=16)
    block = Block(config, 0)
    checkpoint_activations(block, mode)
    x_BTD = torch.randn(2, 16, 32, requires_grad=True)
    y_BTD = block(x_BTD, None, *rope_tables(config, 16, x_BTD.device), block.mlp)
    with Calls() as calls:
        y_BTD.square().sum().backward()
    return calls.counts, [x_BTD.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("mode", "recomputed"), [("none", 0), ("selective", 0), ("full", PRODUCTS - 1)]
)
def test_what_is_recomputed(mode: str, recomputed: int) -> None:
    """Backward does not need the last product, so recomputing stops before it."""
    calls, found = gradients(mode)
    products = calls["mm"] + calls["addmm"]
    assert products == 2 * PRODUCTS + recomputed
    assert calls["_scaled_dot_product_flash_attention_for_cpu"] == 0
    assert calls["_scaled_dot_product_flash_attention_for_cpu_backward"] == 1
    is_recomputed = calls["leaky_relu"] > 0
    assert is_recomputed == (mode != "none")
    for ours, expected in zip(found, gradients("none")[1], strict=True):
        assert torch.equal(ours, expected)
