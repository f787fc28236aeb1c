"""Span sampling: a pure function of (seed, step), vectorized over the global batch.

A span (a, b) covers positions a..b of a row of T, both inclusive: 1 <= a <= b <= T-1. Position
a-1 is the state before it, so position 0 is never inside. The whole row (1, T-1) leaves no
context and is never drawn.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sampler = Literal["start_then_length", "uniform"]

MIN_SEQUENCE = 3


def sample_spans(
    seed: int,
    step: int,
    shape: tuple[int, int],
    seq_len: int,
    max_span_frac: float,
    sampler: Sampler = "start_then_length",
) -> NDArray[np.int64]:
    """Return the spans of every sequence of one global batch.

    Args:
        seed: The run's seed.
        step: Optimizer step; (seed, step) is the key of a counter-based generator.
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


def sample_spans_within(
    seed: int,
    step: int,
    starts_BT: NDArray[np.bool_],
    num_spans: int,
    max_span_frac: float,
    sampler: Sampler = "start_then_length",
) -> NDArray[np.int64]:
    """Return spans that do not cross documents: positions a-1..b are in one.

    The distribution is that of ``sample_spans`` over the remaining spans: a start uniform over
    those with any, then the length; or uniform over all of them.

    Args:
        seed: The run's seed.
        step: Optimizer step; (seed, step) keys the generator, as in ``sample_spans``.
        starts_BT: True where a position is the first of its document (its token is a BOS).
        num_spans: Spans per sequence, S.
        max_span_frac: As in ``sample_spans``.
        sampler: As in ``sample_spans``.

    Returns:
        int64 [B, S, 2] of (a, b); all (0, 0) in a row that has no such span.
    """
    choices_BT = _lengths_within(starts_BT, max_length(starts_BT.shape[1], max_span_frac))
    weight_BT = choices_BT if sampler == "uniform" else (choices_BT > 0).astype(np.int64)
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    # One cumulative sum over the flattened batch: a row's draws index its section of it.
    ends = weight_BT.cumsum()
    row_ends_B1 = ends.reshape(weight_BT.shape)[:, -1:]
    total_B1 = weight_BT.sum(axis=1, keepdims=True)
    drawn_BS = generator.integers(0, np.maximum(total_B1, 1), (len(starts_BT), num_spans))
    drawn_BS = row_ends_B1 - total_B1 + drawn_BS
    index_BS = np.minimum(np.searchsorted(ends, drawn_BS, side="right"), ends.size - 1)
    a_BS = index_BS % starts_BT.shape[1]
    if sampler == "uniform":
        length_BS = 1 + drawn_BS - (ends[index_BS] - weight_BT.ravel()[index_BS])
    else:
        most_BS = np.maximum(choices_BT.ravel()[index_BS], 1)
        length_BS = generator.integers(1, most_BS, endpoint=True)
    spans_BS2 = np.stack([a_BS, a_BS + length_BS - 1], axis=-1)
    return np.where(total_B1[..., None] > 0, spans_BS2, 0)


def grid_spans(
    seq_len: int, max_span_frac: float, num_lengths: int = 8, num_positions: int = 8
) -> NDArray[np.int64]:
    """Return legal spans of geometrically rising lengths (rows) at evenly spaced places (columns).

    They avoid both ends of the row if they can, since a span at an end has another expected loss
    (docs/objective.md).

    Returns:
        int64 [num_lengths, num_positions, 2] of (a, b); short rows repeat lengths and places.
    """
    longest = max(1, min(max_length(seq_len, max_span_frac), seq_len - 3))
    lengths = np.geomspace(1, longest, num_lengths).round().astype(np.int64)[:, None]
    place = np.linspace(0, 1, num_positions)
    starts = (2 + place * (seq_len - 3 - lengths)).round().astype(np.int64)
    return np.stack([starts, starts + lengths - 1], axis=-1)


def max_length(seq_len: int, max_span_frac: float) -> int:
    """Return the longest legal span: the cap, but never the whole row of T-1 positions.

    The cap is the floor of the exact product with the configured decimal number: in floating point
    0.29 * 100 is a little less than 29.
    """
    return min(max(1, math.floor(Fraction(repr(max_span_frac)) * seq_len)), seq_len - 2)


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
    # There are T - l spans of length l: draw one of all, then find its length.
    per_length = seq_len - np.arange(1, longest + 1)
    ends = np.cumsum(per_length)
    drawn = generator.integers(0, ends[-1], shape)
    index = np.searchsorted(ends, drawn, side="right")
    starts = 1 + drawn - (ends[index] - per_length[index])
    return starts, index + 1


def _lengths_within(starts_BT: NDArray[np.bool_], longest: int) -> NDArray[np.int64]:
    """Return how many lengths a span at each position may have without crossing documents.

    A span at a reads the state at a-1, so it begins after the document's first position; it ends
    before the next document does.
    """
    seq_len = starts_BT.shape[1]
    position_T = np.arange(seq_len)
    # The first boundary at or after each position: a running minimum from the right.
    boundary_BT = np.where(starts_BT, position_T, seq_len)
    boundary_BT = np.minimum.accumulate(boundary_BT[:, ::-1], axis=1)[:, ::-1]
    lengths_BT = np.minimum(boundary_BT - position_T, longest)
    lengths_BT[:, 0] = 0
    return lengths_BT
