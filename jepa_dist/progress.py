"""How far a run is: the part of its state that is not tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is, besides its tensors (contract C5); nothing in it depends on the ranks."""

    step: int = 0
    """Optimiser steps done."""
    samples_consumed: int = 0
    phase: int = 0
    """Recurrence phase of the last step."""
    seconds: float = 0.0
    """Training time spent, over all starts of the run."""
    tokens_digest: str = ""
    spans_digest: str = ""
    skip_start: int = 0
    """Of the one stretch of samples that the run passed over when it rolled back."""
    skip_count: int = 0

    @property
    def skip(self) -> range:
        """Samples passed over, as places in the order."""
        return range(self.skip_start, self.skip_start + self.skip_count)
