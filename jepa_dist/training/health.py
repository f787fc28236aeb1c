"""Steps whose loss or gradient is not finite: skipped on the device, counted here."""

from __future__ import annotations

import math

from jepa_dist.parallel.reduce import StepReport
from jepa_dist.run.progress import Progress


class BadSteps:
    """Counters of the steps whose update was skipped: all, and the latest consecutive ones.

    Args:
        progress: Progress of the run, which may have been interrupted between two bad steps.
    """

    def __init__(self, progress: Progress) -> None:
        self.total = progress.bad_steps
        self.consecutive = progress.bad_in_row
        self.row_sample = progress.bad_row_sample
        """Samples that the run had consumed before the first of the consecutive bad steps."""

    def observe(self, report: StepReport, first_sample: int) -> None:
        """Count the next step.

        Args:
            report: Its numbers.
            first_sample: Samples that the run had consumed before it.
        """
        if is_healthy(report):
            self.consecutive = 0
            return
        if self.consecutive == 0:
            self.row_sample = first_sample
        self.consecutive += 1
        self.total += 1

    def end_row(self) -> None:
        """Reset the count of consecutive bad steps: the run continues from another state."""
        self.consecutive = 0


def is_healthy(report: StepReport) -> bool:
    """Return whether the step was applied: the norm is finite only if loss and gradient are."""
    return math.isfinite(report.values["grad_norm"])
