"""Measure an objective's diagnostics in a training step, without a second pass.

The backward of the step computes both gradients that are compared: that of the whole loss arrives
at the tapped state, and that of lambda * JEPA at a view of it that only the objective reads.
``diagnostics`` computes the numbers, docs/objective.md explains them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_dist.objectives.diagnostics import describe_states, gradient_products

_PREFIX = "probe/"


class TapProbe:
    """Probe of one micro-batch of a step: ``watch``, backward, ``measure``; then ``metrics``.

    This class has the diagnostics of all objectives. Subclasses add numbers in ``means`` and
    ``sums``, and turn sums into metrics in ``own_metrics``.
    """

    def __init__(self) -> None:
        self._watched: tuple[list[Tensor], Tensor] | None = None
        self._gradients: dict[str, Tensor] = {}

    def watch(self, states: Sequence[Tensor], tokens_BT: Tensor, num_rows: int) -> list[Tensor]:
        """Watch a micro-batch; call this before its backward.

        Args:
            states: The tapped states [B, T, D] that the rest of the network reads; gradients are
                compared at the first.
            tokens_BT: Their input ids.
            num_rows: Number of rows that are not padding.

        Returns:
            The same states, for the objective to read.
        """
        self._watched = [state.detach()[:num_rows] for state in states], tokens_BT[:num_rows]
        tap_BTD, *others = states
        view_BTD = tap_BTD.view_as(tap_BTD)
        if tap_BTD.requires_grad:  # if not, both gradients are zero
            tap_BTD.register_hook(self._keep("total"))
            view_BTD.register_hook(self._keep("objective"))
        return [view_BTD, *others]

    def measure(self) -> dict[str, Tensor]:
        """Return the diagnostics as float64 scalars that add up over ranks; empty if no
        micro-batch was watched."""
        if self._watched is None:
            return {}
        states, tokens_BT = self._watched
        with torch.no_grad():
            sums = dict(_scalars(self._parts(states, tokens_BT)))
        self._watched = None
        self._gradients = {}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return the numbers of a step for its record, from the sums over all ranks.

        All but the gradients' are means over the watched rows (the first micro-batch of each
        rank). None: not defined for those rows.
        """
        values = {
            name.removeprefix(_PREFIX): value
            for name, value in sums.items()
            if name.startswith(_PREFIX)
        }
        rows = values["rows"]
        ce, objective = math.sqrt(values["ce_sq"]), math.sqrt(values["jepa_sq"])
        means = {
            name.removeprefix("mean/"): value / rows
            for name, value in values.items()
            if name.startswith("mean/")
        }
        return {
            "jepa/grad_ratio": objective / ce if ce > 0 else 0.0 if objective == 0 else None,
            "jepa/grad_cos": values["dot"] / (ce * objective) if ce * objective > 0 else None,
            **{f"jepa/{name}": value for name, value in means.items()},
            **self.own_metrics(values),
        }

    def means(self, states: Sequence[Tensor], tokens_BT: Tensor) -> Mapping[str, Tensor]:
        """Return metrics of the given rows, by name: scalars, reported as means over rows."""
        return {}

    def sums(self, states: Sequence[Tensor], tokens_BT: Tensor) -> Mapping[str, Tensor]:
        """Return tensors that add up over ranks, for ``own_metrics``."""
        return {}

    def own_metrics(self, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return metrics from ``sums`` over all ranks (elements: NAME/i/j) and ``rows``."""
        return {}

    def _parts(self, states: Sequence[Tensor], tokens_BT: Tensor) -> dict[str, Tensor]:
        tap_BTD, rows = states[0], len(states[0])
        none = torch.zeros_like(tap_BTD)
        objective, total = (self._gradients.get(key, none)[:rows] for key in ("objective", "total"))
        means = {**describe_states(tap_BTD), **self.means(states, tokens_BT)}
        return {
            **gradient_products(objective, total),
            **{f"mean/{name}": rows * value for name, value in means.items()},
            **self.sums(states, tokens_BT),
            "rows": torch.tensor(float(rows), device=tap_BTD.device),
        }

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._gradients[name] = gradient.detach()

        return hook


def _scalars(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every element under its own name: ``probe/NAME/i/j``."""
    for name, tensor in parts.items():
        elements = tensor.double().flatten().unbind()
        for place, element in zip(np.ndindex(*tensor.shape), elements, strict=True):
            yield "/".join([_PREFIX + name, *map(str, place)]), element
