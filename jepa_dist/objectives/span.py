"""The span loss of issue #1772: hidden states at the ends of a span move linearly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.model.gpt import OutputLayer
from jepa_dist.objectives.objective import DocumentStarts, Objective, Sampler, Samples, Sums
from jepa_dist.objectives.span_loss import UNSTRUCTURED_LOSS, span_loss
from jepa_dist.objectives.span_probe import SpanProbe
from jepa_dist.objectives.spans import sample_spans, sample_spans_within


class SpanObjective(Objective):
    """Objective that reads one layer and has no parameters. Samples are spans [rows, S, 2]; a row
    without a legal span is all zeros and not counted."""

    def __init__(self, config: Config, bos_id: int | None) -> None:
        super().__init__(config, bos_id)
        self._norm_floor = config.jepa.norm_floor

    @classmethod
    def sample_shape(cls, config: Config) -> tuple[int, ...]:
        """Return (spans per sequence, 2)."""
        return config.jepa.spans_per_sequence, 2

    @classmethod
    def reads_documents(cls, config: Config) -> bool:
        """Return whether spans keep within documents."""
        return config.jepa.within_documents

    @classmethod
    def sampler(cls, config: Config, documents: DocumentStarts | None) -> Sampler:
        """Return the function that draws the spans of a step."""
        return lambda step: _sample_jepa_spans(config, documents, step)

    @classmethod
    def num_rows(cls, config: Config, samples: Samples | None) -> int:
        """Return the number of rows that have spans."""
        return 0 if samples is None else int(np.count_nonzero(samples[:, 0, 0]))

    @property
    def taps(self) -> tuple[int, ...]:
        """Return ``jepa.layer``."""
        return (self.config.jepa.layer,)

    def forward(
        self,
        states: Sequence[Tensor],
        tokens_BT: Tensor,
        weight_B: Tensor,
        samples: Tensor | None,
        output_layer: OutputLayer | None = None,
    ) -> Sums:
        """Return the loss summed over the given rows that have spans."""
        (h_BTD,) = states
        assert samples is not None
        weight_B = weight_B * (samples[:, 0, 0] > 0)
        loss, floored = span_loss(h_BTD, samples.clamp(min=1), weight_B, self._norm_floor)
        return Sums(loss, {"floored": floored})

    def metrics(self, samples: Samples | None, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean cosine, the loss relative to no structure, and the shares not counted."""
        jepa, num_rows = self.config.jepa, self.num_rows(self.config, samples)
        metrics = {}
        if num_rows:
            metrics = {
                "jepa/cos": 1.0 - values["jepa"],
                "jepa/relative": values["jepa"] / UNSTRUCTURED_LOSS,
                "jepa/floored": values["floored"] / (num_rows * jepa.spans_per_sequence),
            }
        if jepa.within_documents:
            metrics["jepa/rows_without_span"] = self.config.batch.sequences - num_rows
        return metrics

    def probe(self, bos_id: int | None, device: torch.device) -> SpanProbe:
        """Return the span probe."""
        config = self.config
        return SpanProbe(config.model.seq_len, config.jepa.max_span_frac, bos_id, device)


def _sample_jepa_spans(config: Config, documents: DocumentStarts | None, step: int) -> Samples:
    """Return the spans of a step's global batch, int64 [rows, S, 2]."""
    jepa, seed = config.jepa, config.seed
    rules = jepa.max_span_frac, jepa.sampler
    if documents is not None:
        return sample_spans_within(seed, step, documents(step), jepa.spans_per_sequence, *rules)
    shape = config.batch.sequences, jepa.spans_per_sequence
    return sample_spans(seed, step, shape, config.model.seq_len, *rules)
