"""Reads the objective's vital signs out of a training step, without a second pass.

The backward of the step computes both gradients that are compared: that of the whole loss arrives
at the tapped state, and that of lambda * JEPA at a view of it which the objective alone reads.
``diagnostics`` says what is made of them, docs/objective.md what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_dist.jepa.diagnostics import (
    cosine_table,
    describe_states,
    document_share,
    gradient_products,
    loss_by_documents,
    sink_share,
)
from jepa_dist.jepa.spans import grid_spans

_PREFIX = "probe/"
_STATES = (
    "effective_rank",
    "participation_ratio",
    "std",
    "mean_share",
    "clock_share",
    "straightness",
    "sink_share",
)


class TapProbe:
    """Watches one micro-batch of a step: ``watch``, backward, ``measure``; then ``metrics``.

    Args:
        seq_len: T.
        max_span_frac: Longest span looked at, as in ``jepa.spans``.
        bos_id: Id that begins every document; None if it is not known.
        device: Where the states are.
    """

    def __init__(
        self,
        seq_len: int,
        max_span_frac: float,
        bos_id: int | None,
        device: torch.device,
    ) -> None:
        grid_LP2 = grid_spans(seq_len, max_span_frac)
        self._grid_LP2 = torch.from_numpy(grid_LP2).to(device)
        self._lengths: list[int] = (grid_LP2[:, 0, 1] - grid_LP2[:, 0, 0] + 1).tolist()
        self._bos_id = bos_id
        self._watched: tuple[Tensor, Tensor] | None = None
        self._gradients: dict[str, Tensor] = {}

    def watch(self, tap_BTD: Tensor, tokens_BT: Tensor, num_rows: int) -> Tensor:
        """Take note of a micro-batch before its backward.

        Args:
            tap_BTD: The tapped states that the rest of the network reads.
            tokens_BT: Their input ids.
            num_rows: How many of the rows are no padding.

        Returns:
            The same states, for the objective to read.
        """
        self._watched = tap_BTD.detach()[:num_rows], tokens_BT[:num_rows]
        view_BTD = tap_BTD.view_as(tap_BTD)
        if tap_BTD.requires_grad:  # if not, no gradient arrives, and that is the finding
            tap_BTD.register_hook(self._keep("total"))
            view_BTD.register_hook(self._keep("objective"))
        return view_BTD

    def measure(self) -> dict[str, Tensor]:
        """What was watched, in float64 scalars that add up over ranks; nothing if nothing was."""
        if self._watched is None:
            return {}
        with torch.no_grad():
            sums = self._sums(*self._watched)
        self._watched = None
        self._gradients = {}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """The numbers of a step for its record, from the sums over all ranks.

        All but the gradients' are means over the rows looked at (the first micro-batch of each
        rank). None stands for what those rows cannot tell. ``jepa/cos_table`` is {"lengths": [L],
        "cos": [L][P]}: mean cos(context, patch) by span length and place in the row.
        """
        told = {
            name.removeprefix(_PREFIX): value
            for name, value in sums.items()
            if name.startswith(_PREFIX)
        }
        rows = told["rows"]
        ce, objective = math.sqrt(told["ce_sq"]), math.sqrt(told["jepa_sq"])
        result: dict[str, Any] = {
            "jepa/grad_ratio": objective / ce if ce > 0 else 0.0 if objective == 0 else None,
            "jepa/grad_cos": told["dot"] / (ce * objective) if ce * objective > 0 else None,
        }
        result |= {f"jepa/{name}": told[name] / rows for name in _STATES}
        if self._bos_id is not None:
            result |= self._by_documents(told)
        table = [
            [round(told[f"cos/{i}/{j}"] / rows, 4) for j in range(self._grid_LP2.size(1))]
            for i in range(self._grid_LP2.size(0))
        ]
        return result | {"jepa/cos_table": {"lengths": self._lengths, "cos": table}}

    def _sums(self, tap_BTD: Tensor, tokens_BT: Tensor) -> dict[str, Tensor]:
        rows, grid_LP2 = len(tap_BTD), self._grid_LP2
        none = torch.zeros_like(tap_BTD)
        objective, total = (self._gradients.get(key, none)[:rows] for key in ("objective", "total"))
        spans_BS2 = grid_LP2.flatten(0, 1).expand(rows, -1, -1)
        states = describe_states(tap_BTD) | {"sink_share": sink_share(tap_BTD, spans_BS2)}
        cosine_BLP = cosine_table(tap_BTD, grid_LP2)
        parts: dict[str, Tensor] = {
            **gradient_products(objective, total),
            **{name: rows * value for name, value in states.items()},
            "cos": cosine_BLP.sum(0),
            "rows": cosine_BLP.new_tensor(rows),
        }
        if self._bos_id is not None:
            documents_BT = (tokens_BT == self._bos_id).cumsum(1)
            parts["document_share"] = rows * document_share(tap_BTD, documents_BT)
            parts |= loss_by_documents(cosine_BLP, grid_LP2, documents_BT)
        return dict(_scalars(parts))

    def _by_documents(self, told: Mapping[str, float]) -> dict[str, float | None]:
        """What needs boundaries; losses are means over the lengths that have spans of both kinds,
        since long spans cross more often and length matters by itself."""
        both = [
            i
            for i in range(len(self._lengths))
            if told[f"within_count/{i}"] > 0 and told[f"cross_count/{i}"] > 0
        ]

        def mean(kind: str) -> float | None:
            losses = [told[f"{kind}_loss/{i}"] / told[f"{kind}_count/{i}"] for i in both]
            return sum(losses) / len(losses) if losses else None

        return {
            "jepa/within_doc": mean("within"),
            "jepa/cross_doc": mean("cross"),
            "jepa/document_share": told["document_share"] / told["rows"],
        }

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._gradients[name] = gradient.detach()

        return hook


def _scalars(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every element under a name of its own: ``probe/NAME/i/j``."""
    for name, tensor in parts.items():
        elements = tensor.double().flatten().unbind()
        for place, element in zip(np.ndindex(*tensor.shape), elements, strict=True):
            yield "/".join([_PREFIX + name, *map(str, place)]), element
