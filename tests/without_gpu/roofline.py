"""Predicted time of every graph on an H100, from the counts and the rates below.

A graph takes as long as its generated kernels take to move their bytes, plus its matrix products
and its attention. Sums that autograd makes outside the graphs, the optimizer and
communication come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jepa_dist.config import Config
from tests.without_gpu.table import Graph

# Assumed: share of 3.35 TB/s that generated kernels reach.
_BYTES_PER_SECOND = 2.7e12
# Assumed: FLOP/s of matrix products by model width; between them by the logarithm of the width.
_NARROW, _WIDE = (512, 550e12), (2048, 700e12)
# Causal attention, forward and backward together: FLOP/s by head width, from the times measured on
# an H200 (docs/performance.md, "Attention kernels").
_ATTENTION_RATE = {"cudnn": {64: 336e12, 128: 422e12}, "flash": {64: 220e12, 128: 240e12}}
_PRODUCTS_IN_ATTENTION = {False: 2, True: 5}  # forward, backward


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one execution of a graph."""

    graph: Graph
    kernels: float
    products: float
    attention: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.kernels + self.products + self.attention


def predict(graphs: Iterable[Graph], config: Config) -> Iterator[Prediction]:
    """Return the times of these graphs of one configuration."""
    for graph in graphs:
        yield Prediction(
            graph,
            kernels=graph.bytes / _BYTES_PER_SECOND * 1e3,
            products=graph.flops / _product_rate(config.model.model_dim) * 1e3,
            attention=_attention_seconds(graph, config) * 1e3,
        )


def step_milliseconds(
    predictions: Iterable[Prediction], phase: str, attention: str, checkpointing: str
) -> float:
    """Return the time of one micro-batch, forward and backward, in a phase with these variants."""
    return sum(
        prediction.total * prediction.graph.runs.get(phase, 0)
        for prediction in predictions
        if prediction.graph.direction != "validation"
        and not prediction.graph.region.startswith("objective.")
        and prediction.graph.attention in ("", attention)
        and prediction.graph.checkpointing in ("", checkpointing)
    )


def _product_rate(width: int) -> float:
    (narrow, low), (wide, high) = _NARROW, _WIDE
    share = math.log(width / narrow) / math.log(wide / narrow)
    return low + (high - low) * min(1.0, max(0.0, share))


def _attention_seconds(graph: Graph, config: Config) -> float:
    model = config.model
    head_dim = model.model_dim // model.num_heads
    # One product of all heads, half of which the causal mask leaves.
    flops = config.batch.micro * model.num_heads * model.seq_len**2 * head_dim
    seconds = 0.0
    for name, calls in graph.calls.items():
        if "attention" in name:
            rate = _ATTENTION_RATE[graph.attention][64 if head_dim <= 64 else 128]
            products = _PRODUCTS_IN_ATTENTION[name.endswith("backward")]
            seconds += calls * products * flops / rate
    return seconds
