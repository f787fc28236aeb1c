"""The source that each place of the order draws from, in closed form.

A stage splits its places by a balanced binary tree over the sources: a node gives the first of its
two halves floor((p + 1) a) - floor(p a) of its place p, a being the half's share of the node's
weight. So the number of draws of a source before any place is known without a table, and within any
run of places it differs from the source's share by less than the depth of the tree: by less than 1
for two sources, by less than 6 for 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from jepa_dist.data.order import Ids, places_of, visit

# Products of two numbers of this size fit into int64.
_UNITS = 10**9


@dataclass(frozen=True)
class Stage:
    """Weights from one place of the order until the next stage."""

    first: int
    """The first place."""
    weights: tuple[int, ...]
    """Weight of each source, relative to their sum (``whole_weights``)."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return weights as integers in the same proportion, rounded to 1e-9 of their sum.

    Positive weights stay positive.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    return tuple(max(int(w > 0), round(w / total * _UNITS)) for w in exact)


class Mixture:
    """The order of samples over several sources: a pure function of the seed and the place.

    The n-th draw of a source is the n-th of its own order (``order.visit``), whatever the weights:
    each source visits all of its samples once before it repeats any. The samples of source k have
    the ids that follow those of source k - 1. A mixture of one source is the order of that source.

    Args:
        sizes: Samples in an epoch of each source.
        stages: In order; the first begins at place 0.
    """

    def __init__(self, sizes: Sequence[int], stages: Sequence[Stage]) -> None:
        self.sizes = tuple(sizes)
        self.stages = tuple(stages)
        self._first_id = np.cumsum([0, *sizes])
        self._first_place = np.array([stage.first for stage in stages], dtype=np.int64)

    def ids(self, first: int, count: int, seed: int, skip: range = range(0)) -> Ids:
        """Return the ids of the samples first..first+count-1 of the run, int64 [count].

        Args:
            first: Samples that the run has consumed before them.
            count: Number of samples.
            seed: Seed of the order.
            skip: Places in the order that the run skips.
        """
        sources, draws = self.draw(places_of(first, count, skip))
        ids = np.empty(count, dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            visited = visit(draws[mine], self.sizes[source], seed, source)
            ids[mine] = self._first_id[source] + visited
        return ids

    def sources_of(self, ids: Ids) -> Ids | None:
        """Return the number of each sample's source; None if there is only one source.

        Args:
            ids: Ids of the samples, int64 [N].
        """
        if len(self.sizes) == 1:
            return None
        return np.searchsorted(self._first_id, ids, side="right") - 1

    def draw(self, places: Ids) -> tuple[Ids, Ids]:
        """Return each place's source and the number of draws of that source before it.

        Args:
            places: Places in the order, int64 [N].
        """
        sources, draws = np.empty_like(places), np.empty_like(places)
        stages = np.searchsorted(self._first_place, places, side="right") - 1
        for index in np.unique(stages).tolist():
            (inside,) = np.nonzero(stages == index)
            stage = self.stages[index]
            earlier = np.array(self.draws_before(stage.first), dtype=np.int64)
            _split(places[inside] - stage.first, inside, stage.weights, 0, (sources, draws))
            draws[inside] += earlier[sources[inside]]
        return sources, draws

    def draws_before(self, place: int) -> tuple[int, ...]:
        """Return how often each source is drawn before a place of the order."""
        totals = [0] * len(self.sizes)
        ends = [*(stage.first for stage in self.stages[1:]), place]
        for stage, end in zip(self.stages, ends, strict=True):
            counts = _counts(max(0, min(end, place) - stage.first), stage.weights)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return tuple(totals)

    def stage_at(self, place: int) -> Stage:
        """Return the stage that a place of the order is in."""
        return self.stages[int(np.searchsorted(self._first_place, place, side="right")) - 1]


def _split(
    places: Ids,
    indices: npt.NDArray[np.intp],
    weights: tuple[int, ...],
    first: int,
    results: tuple[Ids, Ids],
) -> None:
    """Write sources and draws of the places of one node of the tree into ``results``.

    Args:
        places: Counted within the node.
        indices: Index of each place in the results.
        weights: Weights of the node's sources.
        first: Number of the node's first source.
        results: Sources and draws.
    """
    if len(weights) == 1 or not len(places):
        results[0][indices], results[1][indices] = first, places
        return
    half, total = len(weights) // 2, sum(weights)
    part = sum(weights[:half])
    before = _share(places, part, total)
    chosen = _share(places + 1, part, total) > before
    _split(before[chosen], indices[chosen], weights[:half], first, results)
    rest = ~chosen
    _split((places - before)[rest], indices[rest], weights[half:], first + half, results)


def _share(places: Ids, part: int, total: int) -> Ids:
    """Return floor(places * part / total) without overflow."""
    whole, rest = np.divmod(places, total)
    return whole * part + rest * part // total


def _counts(places: int, weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return how often each source is drawn in the first ``places`` of a node."""
    if len(weights) == 1 or not places:
        return (places, *(0 for _ in weights[1:]))
    half = len(weights) // 2
    before = places * sum(weights[:half]) // sum(weights)
    return (*_counts(before, weights[:half]), *_counts(places - before, weights[half:]))
