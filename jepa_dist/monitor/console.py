"""Console output of rank 0: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# Metric, text before and after it, decimal places, factor.
_COLUMNS = (
    ("loss/ce", "ce ", "", 4, 1),
    ("loss/jepa", "jepa ", "", 3, 1),
    ("val/bpb", "val ", " bpb", 4, 1),
    ("grad_norm", "grad ", "", 2, 1),
    ("tokens_per_second", "", " tok/s", 0, 1),
    ("mfu", "mfu ", "%", 1, 100),
)


class Console:
    """Progress bar and one line per logged step."""

    def __init__(self, steps: int, done: int = 0) -> None:
        self._steps = steps
        self._bar = tqdm(
            total=steps, initial=done, unit="step", disable=not sys.stderr.isatty(), smoothing=0.1
        )

    def step(self) -> None:
        """Advance the bar by one optimizer step."""
        self._bar.update()

    def record(self, record: Mapping[str, Any]) -> None:
        """Print a logged step on one line."""
        self.say(log_line(record, self._steps))

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def log_line(record: Mapping[str, Any], steps: int) -> str:
    """Return a logged step as one line of at most 120 columns.

    Args:
        record: The step's record; missing metrics and None are omitted.
        steps: Total steps of the run.
    """
    parts = [
        f"{before}{_number(factor * record[key], digits)}{behind}"
        for key, before, behind, digits, factor in _COLUMNS
        if record.get(key) is not None
    ]
    return f"step {record['step']:>{len(str(steps))}}/{steps}  " + "  ".join(parts)


def _number(value: float, digits: int) -> str:
    """Format with ``digits`` decimal places, in ten characters at most."""
    plain = f"{value:,.{digits}f}"
    return plain if len(plain) <= 10 else f"{value:.1e}"
