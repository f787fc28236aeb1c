"""Alarms about the objective. Each warning fires once and re-arms after a healthy record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_dist.monitor.metrics_file import number, read_records

_RANKS = ("jepa/effective_rank", "jepa/target_effective_rank")
# The trivial solution: the loss is almost 0, and the rank is at most half of its first value.
_TRIVIAL_LOSS, _TRIVIAL_RANK_SHARE = 0.05, 0.5


class JepaAlarms:
    """Alarm for an objective without effect, for collapse, and for a trivial solution (loss near
    0 while the rank of the states falls), from the records of a run.

    Args:
        dead_gradient_ratio: The objective has no gradient if that of lambda * JEPA is less than
            this share of cross-entropy's (``monitor.dead_gradient_ratio``).
        collapse_share: The states collapse if their effective rank is less than this share of its
            first value, in two consecutive records (``monitor.collapse_share``): unusual rows in
            one batch are not a collapse.
    """

    def __init__(self, dead_gradient_ratio: float, collapse_share: float) -> None:
        self._dead_gradient_ratio = dead_gradient_ratio
        self._collapse_share = collapse_share
        self._first: dict[str, tuple[int, float]] = {}
        """Step and first value, by metric."""
        self._previous = math.inf
        self._raised: set[str] = set()

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Process the next record; return its new warnings."""
        for name in _RANKS:
            rank = number(record, name)
            if rank is not None and math.isfinite(rank):
                self._first.setdefault(name, (record["step"], rank))
        found = {
            "gradient": self._no_gradient(record),
            "collapse": self._collapse(record),
            "trivial": self._trivial(record),
        }
        looked = {name for name, warning in found.items() if warning is not None}
        warnings = {name: found[name] for name in looked if found[name]}
        new = [str(warnings[name]) for name in found if name in warnings.keys() - self._raised]
        self._raised = (self._raised - looked) | warnings.keys()
        return new

    def recall(self, metrics: Path) -> None:
        """Process the records of the run's earlier starts (``metrics.jsonl``) without warning."""
        if not metrics.exists():
            return
        for record in read_records(metrics):
            if record is not None:  # a crash cuts a line short
                self.observe(record)

    def _no_gradient(self, record: Mapping[str, Any]) -> str | None:
        """Return a warning, "" if there is a gradient, None if the record has no such metric."""
        ratio, weight = number(record, "jepa/grad_ratio"), number(record, "jepa/lambda")
        if ratio is None or weight is None:
            return None
        if ratio > 0 and not ratio < self._dead_gradient_ratio:
            return ""
        return (
            f"step {record['step']}: the JEPA loss is on (lambda {weight:.3g}) but "
            f"its gradient at the tapped state is {ratio:.1e} of cross-entropy's: it does nothing. "
            "Raise jepa.lambda, tap another jepa.layer, or look for what cuts the gradient off"
        )

    def _collapse(self, record: Mapping[str, Any]) -> str | None:
        rank = number(record, "jepa/effective_rank")
        if rank is None or not math.isfinite(rank):
            return None
        step, first = self._first["jepa/effective_rank"]
        higher, self._previous = max(rank, self._previous), rank
        if higher >= self._collapse_share * first:
            return ""
        return (
            f"step {record['step']}: the tapped states collapse: they use {rank:.1f} directions "
            f"(jepa/effective_rank), at step {step} it was {first:.1f}. Lower jepa.lambda or the "
            "learning rates, or start later (jepa.start_frac); docs/objective.md"
        )

    def _trivial(self, record: Mapping[str, Any]) -> str | None:
        relative = number(record, "jepa/relative")
        ranks = {name: number(record, name) for name in _RANKS if name in self._first}
        shares = {
            name: rank / self._first[name][1]
            for name, rank in ranks.items()
            if rank is not None and self._first[name][1] > 0
        }
        if relative is None or not shares:
            return None
        name, share = min(shares.items(), key=lambda item: item[1])
        if relative >= _TRIVIAL_LOSS or share >= _TRIVIAL_RANK_SHARE:
            return ""
        return (
            f"step {record['step']}: the objective is solved trivially: its loss is {relative:.1%} "
            f"of that of a useless prediction while {name} fell to {share:.0%} of its first value. "
            "Lower jepa.lambda, start later (jepa.start_frac), or see docs/objective.md"
        )
