"""Size of a step's update relative to the weights: |update| / |weight| per group.

Measured on a sample: up to ``_SAMPLED`` elements of every shard, evenly spaced over rows and
columns, are copied before the optimizer step. This needs no copy of the weights, and sums over
ranks give the ratio of all elements, up to sampling error.
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
    """Measurement of update ratios: call ``before`` and ``after`` a step, then ``metrics``.

    Args:
        groups: Parameters (plain or DTensor) by group name.
    """

    def __init__(self, groups: Mapping[str, Iterable[Tensor]]) -> None:
        self._groups = {name: list(parameters) for name, parameters in groups.items()}
        self._before: dict[str, list[Tensor]] = {}

    def before(self) -> None:
        """Copy the sampled weights."""
        self._before = {
            name: [sample.clone() for sample in _samples(parameters)]
            for name, parameters in self._groups.items()
        }

    def after(self) -> dict[str, Tensor]:
        """Return squared norms of update and weight, 0-dim float32 on the device, to be summed
        over ranks; empty unless ``before`` was called."""
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
        """Return ratios by group, from the sums over all ranks; empty if not measured."""
        ratios = {}
        for name in self._groups:
            weight = sums.get(f"{_PREFIX}/{name}/weight", 0.0)
            if weight > 0:
                ratio = sums[f"{_PREFIX}/{name}/update"] / weight
                ratios[f"{_PREFIX}/{name}"] = math.sqrt(ratio)
        return ratios


def _samples(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield views of evenly spaced elements."""
    for parameter in parameters:
        yield local(parameter).flatten()[:: _stride(parameter)]


def _stride(parameter: Tensor) -> int:
    """Return a stride coprime to the width: any other stride would skip columns."""
    whole = local(parameter)
    stride = max(1, math.ceil(whole.numel() / _SAMPLED))
    while whole.dim() > 1 and whole.numel() > 0 and math.gcd(stride, whole.size(-1)) > 1:
        stride += 1
    return stride


def _square(samples: Iterable[Tensor], factors: list[float]) -> Tensor:
    """Return the estimated sum of squares; a factor is the root of the number of elements per
    sampled one."""
    norms = torch._foreach_norm([sample.float() for sample in samples])
    return torch.stack(torch._foreach_mul(norms, factors)).square().sum()
