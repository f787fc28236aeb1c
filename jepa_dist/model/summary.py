"""Text summary of a model: parameters by region, FLOPs per token, memory of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from jepa_dist.config import ModelConfig
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.model.flops import training_flops_per_token


def model_summary(named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig) -> str:
    """Return the summary as text.

    Args:
        named_parameters: All parameters of model and objective, plain tensors or DTensors (full
            shapes are counted).
        config: The model.
    """
    sizes: Counter[str] = Counter()
    for name, parameter in named_parameters:
        sizes[_region(name)] += parameter.numel()
    total = sum(sizes.values())
    rows = [*sorted(sizes.items()), ("total", total)]
    phases = [0, LAST_PHASE] if config.num_loops > 0 else [0]
    return "\n".join(
        [
            *(f"{name:<14} {count:>16,} parameters" for name, count in rows),
            "",
            *(
                f"training FLOPs per token{f', phase {phase}' if phase else ''}: "
                f"{training_flops_per_token(config, phase):.4g}"
                for phase in phases
            ),
            f"weights in float32: {4 * total / 2**20:,.1f} MiB over all shards",
        ]
    )


def _region(name: str) -> str:
    """Return ``blocks.N`` for a block's parameter, else the first part of its name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
