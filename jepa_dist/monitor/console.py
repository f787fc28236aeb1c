"""What rank 0 says while it trains: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_COLUMNS = (
    ("loss/ce", "ce {:.4f}"),
    ("loss/jepa", "jepa {:.3f}"),
    ("val/bpb", "val {:.4f} bpb"),
    ("grad_norm", "grad {:.2f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("mfu", "mfu {:.1%}"),
)


class Console:
    """Progress of the run, for people."""

    def __init__(self, steps: int, done: int = 0) -> None:
        self._steps = steps
        self._bar = tqdm(
            total=steps, initial=done, unit="step", disable=not sys.stderr.isatty(), smoothing=0.1
        )

    def step(self) -> None:
        """One optimiser step is done."""
        self._bar.update()

    def record(self, record: Mapping[str, Any]) -> None:
        """Print a logged step on one line."""
        parts = [shown.format(record[key]) for key, shown in _COLUMNS if _has(record, key)]
        self.say(
            f"step {record['step']:>{len(str(self._steps))}}/{self._steps}  " + "  ".join(parts)
        )

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _has(record: Mapping[str, Any], key: str) -> bool:
    return record.get(key) is not None
