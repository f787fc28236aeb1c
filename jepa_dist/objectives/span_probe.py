"""Diagnostics of the span loss: short-cuts, documents, its value by span length and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_dist.objectives.diagnostics import (
    cosine_table,
    document_share,
    loss_by_documents,
    sink_share,
)
from jepa_dist.objectives.probe import TapProbe
from jepa_dist.objectives.spans import grid_spans


class SpanProbe(TapProbe):
    """Probe of the span objective, which also evaluates a fixed grid of spans.

    Args:
        seq_len: T.
        max_span_frac: Longest span of the grid, as in ``objectives.spans``.
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
        super().__init__()
        grid_LP2 = grid_spans(seq_len, max_span_frac)
        self._grid_LP2 = torch.from_numpy(grid_LP2).to(device)
        self._lengths: list[int] = (grid_LP2[:, 0, 1] - grid_LP2[:, 0, 0] + 1).tolist()
        self._bos_id = bos_id

    def means(self, states: Sequence[Tensor], tokens_BT: Tensor) -> Mapping[str, Tensor]:
        """Return the shares of the sink and of documents."""
        tap_BTD = states[0]
        spans_BS2 = self._grid_LP2.flatten(0, 1).expand(len(tap_BTD), -1, -1)
        means = {"sink_share": sink_share(tap_BTD, spans_BS2)}
        if self._bos_id is not None:
            means["document_share"] = document_share(tap_BTD, self._documents(tokens_BT))
        return means

    def sums(self, states: Sequence[Tensor], tokens_BT: Tensor) -> Mapping[str, Tensor]:
        """Return cosines on the grid, and losses inside and across documents."""
        cosine_BLP = cosine_table(states[0], self._grid_LP2)
        sums = {"cos": cosine_BLP.sum(0)}
        if self._bos_id is not None:
            sums |= loss_by_documents(cosine_BLP, self._grid_LP2, self._documents(tokens_BT))
        return sums

    def own_metrics(self, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return the losses by documents, and ``jepa/cos_table``: {"lengths": [L], "cos": [L][P]},
        mean cos(context, patch) by span length and place in the row."""
        lengths, places = self._grid_LP2.shape[:2]
        table = [
            [round(values[f"cos/{i}/{j}"] / values["rows"], 4) for j in range(places)]
            for i in range(lengths)
        ]
        documents = {} if self._bos_id is None else self._by_documents(values)
        return {**documents, "jepa/cos_table": {"lengths": self._lengths, "cos": table}}

    def _documents(self, tokens_BT: Tensor) -> Tensor:
        assert self._bos_id is not None
        return tokens_BT.eq(self._bos_id).cumsum(1)

    def _by_documents(self, values: Mapping[str, float]) -> dict[str, float | None]:
        """Return means over the lengths that have spans of both kinds: long spans cross more often,
        and the loss depends on the length."""
        both = [
            i
            for i in range(len(self._lengths))
            if values[f"within_count/{i}"] > 0 and values[f"cross_count/{i}"] > 0
        ]

        def mean(kind: str) -> float | None:
            losses = [values[f"{kind}_loss/{i}"] / values[f"{kind}_count/{i}"] for i in both]
            return sum(losses) / len(losses) if losses else None

        return {"jepa/within_doc": mean("within"), "jepa/cross_doc": mean("cross")}
