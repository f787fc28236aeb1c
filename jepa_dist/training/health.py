"""Steps whose loss or gradient is not finite: skipped on the device, counted here."""

from __future__ import annotations

import math

from jepa_dist.parallel.reduce import StepReport
from jepa_dist.run.progress import Progress


class BadSteps:
    """Counts the steps whose update was skipped, and how many came in a row.

    Args:
        progress: Of the run, which may have been interrupted within a row.
    """

    def __init__(self, progress: Progress) -> None:
        self.total = progress.bad_steps
        self.in_row = progress.bad_in_row
        self.row_sample = progress.bad_row_sample
        """First sample of the row's batches, in samples that the run had consumed before."""

    def observe(self, report: StepReport, first_sample: int) -> None:
        """Take in a step, in order.

        Args:
            report: Its numbers.
            first_sample: Samples that the run had consumed before it.
        """
        if is_healthy(report):
            self.in_row = 0
            return
        if self.in_row == 0:
            self.row_sample = first_sample
        self.in_row += 1
        self.total += 1

    def end_row(self) -> None:
        """The run goes on elsewhere: the next bad step is the first of a new row."""
        self.in_row = 0


def is_healthy(report: StepReport) -> bool:
    """Whether the step updated anything: the norm is not finite if any loss or gradient is not."""
    return math.isfinite(report.values["grad_norm"])
