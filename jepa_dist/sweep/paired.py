"""Statistics of paired differences: tests, power, equivalence, and a repeatable test.

All tests are two-sided and exact under their assumptions: Student's t for normal differences, the
sign-flip test for differences that are symmetric around zero. ``repeatable_p`` is valid no matter
how often it is computed, so seeds may be added until it decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
POWER = 0.8
MOST_PAIRS = 1000
"""Maximum number of pairs in the search for the number that decides."""

_MOST_FLIPPED = 40  # pairs of the exact sign-flip test: 2 * 2**20 sums
_SIMPSON_POINTS = 2001

# ---------------------------------------------------------------------------- Student's t


def t_tail(t: float, freedom: int) -> float:
    """Return P(T > t) of Student's t distribution, by the regularized incomplete beta function."""
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t >= 0 else 1 - tail


@cache
def t_quantile(tail: float, freedom: int) -> float:
    """Return the t at which P(T > t) is ``tail`` (0 < tail < 0.5)."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > tail:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return I_x(a, b) by its continued fraction (modified Lentz's method)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + term * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + term / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


# ---------------------------------------------------------------------------- tests


def paired_t_p(differences: Sequence[float]) -> float | None:
    """Return the p-value of the paired t-test; None with fewer than two pairs."""
    if len(differences) < 2:
        return None
    error = standard_error(differences)
    mean = statistics.fmean(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * t_tail(abs(mean) / error, len(differences) - 1)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Return the exact p-value of the sign-flip test, None above 40 pairs or without one.

    It is the share of all 2^n assignments of signs whose sum is at least as far from zero as the
    observed one. The sums of both halves of the pairs are enumerated and compared.
    """
    count = len(differences)
    if not 0 < count <= _MOST_FLIPPED:
        return None
    values = np.abs(np.asarray(differences, dtype=np.float64))
    left, right = _signed_sums(values[: count // 2]), np.sort(_signed_sums(values[count // 2 :]))
    limit = abs(math.fsum(differences))
    limit -= 1e-9 * float(values.sum())  # counts sums that only differ by rounding
    above = len(right) - np.searchsorted(right, limit - left, side="left")
    below = np.searchsorted(right, -limit - left, side="right")
    share = float(above.sum(dtype=np.float64) + below.sum(dtype=np.float64)) / 2.0**count
    return min(1.0, share)


def _signed_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums - value, sums + value))
    return sums


def equivalence_p(differences: Sequence[float], margin: float) -> float | None:
    """Return the p-value of two one-sided t-tests (TOST) that the mean lies within +-``margin``."""
    if len(differences) < 2:
        return None
    error, mean = standard_error(differences), statistics.fmean(differences)
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return t_tail((margin - abs(mean)) / error, len(differences) - 1)


def repeatable_p(differences: Sequence[float], mean: float = 0.0) -> float:
    """Return a p-value against ``mean`` that is valid at all sizes at once (an e-process).

    P(it is ever <= p, over all n) <= p. It is 1 over the largest Bayes factor so far of effects
    delta ~ N(0, 1), in standard deviations, against 0, with the right Haar prior on the standard
    deviation: BF = (1 + n)^(-1/2) * ((1 + u) / (1 + u/(1 + n)))^(n/2) with u = t^2/(n - 1). Without
    an effect it is a martingale (Lai 1976; Wang and Ramdas, arXiv 2310.03722).
    """
    count = np.arange(2, len(differences) + 1)
    values = np.asarray(differences, dtype=np.float64) - mean
    sums, squares = np.cumsum(values)[1:], np.cumsum(values**2)[1:]
    share = sums**2 / (count * np.maximum(squares, 1e-300))  # t^2 / (t^2 + n - 1)
    log_factor = -count / 2 * np.log1p(-share * count / (1 + count)) - 0.5 * np.log1p(count)
    return math.exp(-float(log_factor.max(initial=0.0)))


def standard_error(differences: Sequence[float]) -> float:
    """Return the standard error of the mean; nan with a single pair."""
    if len(differences) < 2:
        return math.nan
    return float(np.std(differences, ddof=1)) / math.sqrt(len(differences))


def mean_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None with fewer than two pairs."""
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    half = t_quantile(LEVEL / 2, len(differences) - 1) * standard_error(differences)
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


# ---------------------------------------------------------------------------- power


def power(effect: float, pairs: int, level: float = LEVEL) -> float:
    """Return the probability that the paired t-test detects ``effect``, in standard deviations."""
    critical = t_quantile(level / 2, pairs - 1)
    shift = effect * math.sqrt(pairs)
    return _shifted_tail(critical, shift, pairs - 1) + _shifted_tail(critical, -shift, pairs - 1)


def _shifted_tail(t: float, shift: float, freedom: int) -> float:
    """Return P((Z + shift) / S > t), S^2 = chi-squared / freedom: the noncentral t distribution.

    Simpson's rule over S; its density is negligible beyond the bounds.
    """
    spread = 8 / math.sqrt(2 * freedom)
    s = np.linspace(max(1e-9, 1 - spread), 1 + spread + 2 / freedom, _SIMPSON_POINTS)
    log_density = (
        math.log(2)
        + freedom / 2 * math.log(freedom / 2)
        - math.lgamma(freedom / 2)
        + (freedom - 1) * np.log(s)
        - freedom * s * s / 2
    )
    tail = np.array([0.5 * math.erfc((t * value - shift) / math.sqrt(2)) for value in s])
    weights = np.ones(_SIMPSON_POINTS)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * np.exp(log_density) * tail).sum() * (s[1] - s[0]) / 3)


@cache
def detectable_effect(pairs: int, level: float = LEVEL) -> float:
    """Return the smallest effect, in standard deviations, that this many pairs detect in 80 %."""
    low, high = 0.0, 1.0
    while power(high, pairs, level) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, pairs, level) < POWER else (low, middle)
    return high


def pairs_to_decide(differences: Sequence[float], margin: float | None) -> int | None:
    """Return how many more pairs would decide in 80 %, if mean and deviation stay as observed.

    Either the difference is detected, or, inside of the margin, equivalence is shown (normal
    approximation). None if more than ``MOST_PAIRS`` would be needed, or the deviation is unknown.
    """
    count = len(differences)
    if count < 2:
        return None
    deviation, mean = float(np.std(differences, ddof=1)), abs(statistics.fmean(differences))
    needed = []
    if mean > 0:
        needed.append(_normal_pairs(LEVEL / 2, deviation / mean))
    if margin is not None and mean < margin:
        needed.append(_normal_pairs(LEVEL, deviation / (margin - mean)))
    fewest = min(needed, default=math.inf)
    return max(1, math.ceil(fewest) - count) if fewest <= MOST_PAIRS else None


def _normal_pairs(tail: float, deviations: float) -> float:
    quantiles = sum(statistics.NormalDist().inv_cdf(p) for p in (1 - tail, POWER))
    return (quantiles * deviations) ** 2 + 1
