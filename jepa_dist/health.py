"""Steps whose loss or gradient is not finite: skipped on the device, counted here."""

from __future__ import annotations

import math

from jepa_dist.parallel.reduce import StepReport


class BadSteps:
    """Counts the steps whose update was skipped, and how many came in a row."""

    def __init__(self) -> None:
        self.total = 0
        self.in_row = 0
        self.first_of_row = 0
        """Step at which the row began."""

    def observe(self, report: StepReport) -> None:
        """Take in a step, in order."""
        if is_healthy(report):
            self.in_row = 0
            return
        if self.in_row == 0:
            self.first_of_row = report.step
        self.in_row += 1
        self.total += 1

    def end_row(self) -> None:
        """The run goes on elsewhere: the next bad step is the first of a new row."""
        self.in_row = 0


def is_healthy(report: StepReport) -> bool:
    """Whether the step updated anything: the norm is not finite if any loss or gradient is not."""
    return math.isfinite(report.values["grad_norm"])
