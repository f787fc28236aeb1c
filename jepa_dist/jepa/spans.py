"""Span sampling: a pure function of (seed, step), vectorised over the global batch (contract C3).

A span (a, b) covers positions a..b of a row of T, both inclusive: 1 <= a <= b <= T-1. Position
a-1 is the state before it, so position 0 never lies inside. The whole row (1, T-1) leaves no
context and is never drawn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

MIN_SEQUENCE = 3


def sample_spans(
    seed: int,
    step: int,
    shape: tuple[int, int],
    seq_len: int,
    max_span_frac: float,
    sampler: Literal["start_then_length", "uniform"] = "start_then_length",
) -> NDArray[np.int64]:
    """Spans of every sequence of one global batch.

    Args:
        seed: The run's seed.
        step: Optimiser step; (seed, step) keys a counter-based generator of its own.
        shape: (sequences of the global batch, spans per sequence).
        seq_len: T, at least 3.
        max_span_frac: A span is at most ``max(1, floor(max_span_frac * T))`` long.
        sampler: ``start_then_length``: uniform start, then uniform length up to what the cap and
            the row allow. ``uniform``: uniform over all legal spans.

    Returns:
        int64 [*shape, 2] of (a, b).

    Raises:
        ValueError: ``seq_len`` is below 3: no legal span exists.
    """
    if seq_len < MIN_SEQUENCE:
        raise ValueError(f"no legal span in a row of {seq_len} positions; at least 3 are needed")
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    draw = _start_then_length if sampler == "start_then_length" else _uniform
    starts, lengths = draw(generator, shape, seq_len, max_length(seq_len, max_span_frac))
    return np.stack([starts, starts + lengths - 1], axis=-1)


def max_length(seq_len: int, max_span_frac: float) -> int:
    """Longest legal span: the cap, and never the whole row of T-1 positions."""
    return min(max(1, int(max_span_frac * seq_len)), seq_len - 2)


_Draw = tuple[NDArray[np.int64], NDArray[np.int64]]


def _start_then_length(
    generator: np.random.Generator, shape: tuple[int, int], seq_len: int, longest: int
) -> _Draw:
    starts = generator.integers(1, seq_len, shape)
    lengths = generator.integers(1, np.minimum(longest, seq_len - starts), endpoint=True)
    return starts, lengths


def _uniform(
    generator: np.random.Generator, shape: tuple[int, int], seq_len: int, longest: int
) -> _Draw:
    # There are T - l spans of length l: draw one of all and see which length it falls into.
    per_length = seq_len - np.arange(1, longest + 1)
    ends = np.cumsum(per_length)
    drawn = generator.integers(0, ends[-1], shape)
    index = np.searchsorted(ends, drawn, side="right")
    starts = 1 + drawn - (ends[index] - per_length[index])
    return starts, index + 1
