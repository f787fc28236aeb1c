"""The share of steps whose gradient is clipped."""

from __future__ import annotations


class ClippedShare:
    """The share of steps whose gradient norm was above the limit.

    Args:
        max_norm: The limit; 0 clips nothing, and there is no metric.
    """

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self._steps = 0
        self._clipped = 0

    def observe(self, grad_norm: float) -> None:
        """Count a step; one whose norm is not finite counts as not clipped (its update is
        skipped)."""
        self._steps += 1
        self._clipped += self._max_norm < grad_norm < float("inf")

    def record(self) -> dict[str, float]:
        """Return the metric over the steps since the last call."""
        steps, clipped = self._steps, self._clipped
        self._steps = self._clipped = 0
        return {"clipped_share": clipped / steps} if self._max_norm > 0 and steps else {}
