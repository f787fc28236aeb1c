"""Time and tokens: how fast the run is, counting only what was trained (contract C8)."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Measures the stretch of steps between two records, evaluations left out."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._rates: list[float] = []
        self.start()

    def start(self) -> None:
        """Training begins now."""
        self._started = time.perf_counter()
        self._begin()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in here is reported as ``time/data_wait``."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time spent in here does not count as training."""
        start = time.perf_counter()
        yield
        self._evaluation += time.perf_counter() - start

    def step(self) -> None:
        """One optimiser step is under way or done."""
        self._steps += 1

    def lap(self) -> dict[str, float]:
        """Means over the steps since the last lap (seconds per step; trained tokens/s)."""
        seconds = time.perf_counter() - self._lap_started - self._evaluation
        rate = self._steps * self._tokens_per_step / seconds
        self._rates.append(rate)
        result = {
            "tokens_per_second": rate,
            "time/step": seconds / self._steps,
            "time/data_wait": self._data_wait / self._steps,
        }
        self._begin()
        return result

    def summary(self) -> dict[str, float]:
        """Median tokens/s over the laps (without the first, which compiles) and total seconds."""
        rates = self._rates[1:] or self._rates
        return {
            "tokens_per_second": statistics.median(rates),
            "seconds": time.perf_counter() - self._started,
        }

    def _begin(self) -> None:
        self._lap_started = time.perf_counter()
        self._steps = 0
        self._data_wait = 0.0
        self._evaluation = 0.0


class TokensDigest:
    """Rolling digest of all token ids consumed so far, in global order.

    A step's contribution is the sum of a hash per row, keyed by the row's place in the global
    batch: ranks can add theirs up, and the result does not depend on how many there are.
    """

    def __init__(self, so_far: str = "") -> None:
        self._digest = bytes.fromhex(so_far)

    def update(self, step_sum: int) -> None:
        """Take in one step's sum (unsigned 64-bit)."""
        step = step_sum.to_bytes(8, "little")
        self._digest = hashlib.blake2b(self._digest + step, digest_size=16).digest()

    def hex(self) -> str:
        """The digest as 32 hexadecimal digits (empty before the first step)."""
        return self._digest.hex()
