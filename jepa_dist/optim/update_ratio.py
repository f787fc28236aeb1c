"""How far a step moves the weights, relative to their size: |update| / |weight| per group.

Measured on a sample: up to ``_SAMPLED`` elements of every shard, evenly spaced and from all columns
alike, are kept while the optimizer steps. That costs no copy of the weights, and sums over ranks
give the same ratio as all elements would, up to sampling error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from jepa_dist.optim.local_shards import local

_SAMPLED = 4096
_PREFIX = "update_ratio"


class UpdateRatio:
    """Call ``before`` and ``after`` around a step, on every rank alike; then ``metrics``.

    Args:
        groups: Parameters (plain or DTensor) by group name.
    """

    def __init__(self, groups: Mapping[str, Iterable[Tensor]]) -> None:
        self._groups = {name: list(parameters) for name, parameters in groups.items()}
        self._before: dict[str, list[Tensor]] = {}

    def before(self) -> None:
        """Keep the sampled weights."""
        self._before = {
            name: [sample.clone() for sample in _samples(parameters)]
            for name, parameters in self._groups.items()
        }

    def after(self) -> dict[str, Tensor]:
        """Squares of update and weight, 0-dim float32 on the device, to be added up over ranks;
        nothing unless ``before`` was called."""
        sums: dict[str, Tensor] = {}
        for name, before in self._before.items():
            parameters = self._groups[name]
            after = list(_samples(parameters))
            factors = [
                math.sqrt(local(whole).numel() / max(1, sample.numel()))
                for whole, sample in zip(parameters, after, strict=True)
            ]
            sums[f"{_PREFIX}/{name}/weight"] = _square(after, factors)
            sums[f"{_PREFIX}/{name}/update"] = _square(torch._foreach_sub(after, before), factors)
        self._before = {}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Ratios by group, from the sums over all ranks; none where they were not measured."""
        ratios = {}
        for name in self._groups:
            weight = sums.get(f"{_PREFIX}/{name}/weight", 0.0)
            if weight > 0:
                ratio = sums[f"{_PREFIX}/{name}/update"] / weight
                ratios[f"{_PREFIX}/{name}"] = math.sqrt(ratio)
        return ratios


def _samples(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    """Views of evenly spaced elements."""
    for parameter in parameters:
        yield local(parameter).flatten()[:: _stride(parameter)]


def _stride(parameter: Tensor) -> int:
    """Coprime to the width: a stride that has a factor in common with it passes over columns."""
    whole = local(parameter)
    stride = max(1, math.ceil(whole.numel() / _SAMPLED))
    while whole.dim() > 1 and whole.numel() > 0 and math.gcd(stride, whole.size(-1)) > 1:
        stride += 1
    return stride


def _square(samples: Iterable[Tensor], factors: list[float]) -> Tensor:
    """Estimated sum of squares; the factors are roots of elements
    per sampled one."""
    norms = torch._foreach_norm([sample.float() for sample in samples])
    return torch.stack(torch._foreach_mul(norms, factors)).square().sum()
