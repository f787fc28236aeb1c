"""What a sweep found: differences to the control, paired by seed, with their uncertainty.

A pair counts only if both runs are finished, were made by this list, and consumed the same tokens
in the same order (``tokens_digest``). Every difference comes with its standard error over the
pairs, and is called one only where it leaves the two-sided 95 % interval of Student's t
distribution around zero: with three pairs that takes 4.3 standard errors.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_dist.config import load
from jepa_dist.errors import UserError
from jepa_dist.sweep.members import CONTROL, Member, settings_of

# 97.5 % points of Student's t distribution with 1, 2, ... degrees of freedom; with more than
# listed, the last one errs on the side of caution.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Keys that do not change what is trained.
_INCIDENTAL = ("parallel.", "checkpoint.", "monitor.", "data.workers", "data.prefetch")

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences (arm less control)."""

    mean: float
    error: float
    """Standard error of the mean; nan with a single pair."""
    pairs: int

    @property
    def is_beyond_noise(self) -> bool:
        """Whether zero lies outside the 95 % interval."""
        if self.pairs < 2:
            return False
        quantile = _STUDENT_T[min(self.pairs - 1, len(_STUDENT_T)) - 1]
        return abs(self.mean) > quantile * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} +- {self.error:.4f}"


def paired_difference(pairs: Iterable[tuple[float, float]]) -> Difference | None:
    """Of (arm, control) values; None without a pair."""
    differences = [arm - control for arm, control in pairs]
    if not differences:
        return None
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Difference(statistics.fmean(differences), error, count)


@dataclass
class Results:
    """Closing records of the finished members, and what is missing."""

    arms: list[str]
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    """By arm and seed: the last record, with the best validation of the run beside it."""
    left_out: list[str] = field(default_factory=list)
    """One line for each member that does not count, with the reason."""

    @property
    def metric(self) -> str:
        """Bits per byte; nats per token where there is no tokenizer to count bytes with."""
        has_bytes = all(record["val/bpb"] is not None for record in self.records.values())
        return "val/bpb" if has_bytes else "val/loss"

    def values(self, arm: str, key: str) -> dict[int, float]:
        """A number of every finished seed of an arm, where its record has it."""
        return {
            seed: record[key]
            for (name, seed), record in self.records.items()
            if name == arm and record.get(key) is not None
        }

    def difference(self, arm: str, key: str) -> Difference | None:
        """An arm's paired difference to the control."""
        ours, control = self.values(arm, key), self.values(CONTROL, key)
        return paired_difference((ours[seed], control[seed]) for seed in ours if seed in control)


def read_results(members: Iterable[Member]) -> Results:
    """Read what the members left in their run directories."""
    members = list(members)
    results = Results(list(dict.fromkeys(member.arm for member in members)))
    for member in members:
        try:
            results.records[member.arm, member.seed] = _read(member)
        except UserError as error:
            results.left_out += error.problems
    _leave_out_unpaired(results)
    return results


def _read(member: Member) -> Record:
    """The closing record of a finished run that this list describes.

    Raises:
        UserError: there is none.
    """
    records = _records(member.run_dir)
    if not records:
        raise UserError(f"{member.run_dir}: not started yet")
    if not records[-1].get("final"):
        raise UserError(f"{member.run_dir}: not finished, at step {records[-1]['step']}")
    _refuse_other_settings(member)
    data = json.loads((member.run_dir / "data.json").read_text(encoding="utf-8"))
    return records[-1] | _best(records) | {"data": data}


def _records(run_dir: Path) -> list[Record]:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    records = []
    for line in lines:
        with suppress(ValueError):  # cut short, while it is being written
            records.append(json.loads(line))
    return records


def _best(records: list[Record]) -> Record:
    """The best validation along the run: what stopping early would have given."""
    found = {}
    for key in ("val/bpb", "val/loss"):
        values = [record[key] for record in records if record.get(key) is not None]
        found[f"best/{key}"] = min(values) if values else None
    return found


def _refuse_other_settings(member: Member) -> None:
    made_by = settings_of(load(member.run_dir / "config.yaml", environ={}).config)
    wanted = settings_of(member.resolve())
    other = [
        f"{key} was {made_by.get(key)!r} and is {value!r} in the list"
        for key, value in wanted.items()
        if made_by.get(key) != value and not key.startswith(_INCIDENTAL)
    ]
    if other:
        raise UserError(f"{member.run_dir}: made with other settings: {'; '.join(other)}")


def _leave_out_unpaired(results: Results) -> None:
    """Runs that did not see their control's tokens would be compared as if they had."""
    for (arm, seed), record in list(results.records.items()):
        control = results.records.get((CONTROL, seed), record)
        for key, what in (("tokens_digest", "tokens"), ("data", "data")):
            if record[key] != control[key]:
                results.left_out.append(f"{arm}, seed {seed}: not the {what} of its control")
                results.records.pop((arm, seed), None)


# ---------------------------------------------------------------------------- table


def describe(results: Results) -> list[str]:
    """One table and one sentence per arm."""
    if not results.records:
        return ["no member is finished", *_left_out(results)]
    metric = results.metric
    header = ["arm", "seeds", metric, "to control", f"best {metric}", "EMA", "tokens/s"]
    rows = [header, *(_row(results, arm, metric) for arm in results.arms)]
    return [
        *_align(rows),
        "",
        "seeds: finished; to control, best, EMA: mean difference to the control over paired seeds",
        "+- its standard error (best: the lowest validation along the run); tokens/s: mean.",
        "",
        *(_verdict(results, arm, metric) for arm in results.arms if arm != CONTROL),
        *_left_out(results),
    ]


def _row(results: Results, arm: str, metric: str) -> list[str]:
    values = results.values(arm, metric)
    ema = metric.replace("val/", "val/ema_")
    differences = (results.difference(arm, key) for key in (metric, f"best/{metric}", ema))
    return [
        arm,
        str(len(values)),
        _mean(values, ".4f"),
        *("" if d is None or arm == CONTROL else str(d) for d in differences),
        _mean(results.values(arm, "tokens_per_second"), ",.0f"),
    ]


def _mean(values: Mapping[int, float], form: str) -> str:
    return format(statistics.fmean(values.values()), form) if values else "-"


def _verdict(results: Results, arm: str, metric: str) -> str:
    difference = results.difference(arm, metric)
    if difference is None:
        return f"{arm}: no pair yet"
    if difference.pairs == 1:
        return f"{arm}: {difference.mean:+.4f} in one pair, which says nothing about the noise"
    if not difference.is_beyond_noise:
        return f"{arm}: {difference} over {difference.pairs} pairs: within noise"
    word = "worse" if difference.mean > 0 else "better"
    return f"{arm}: {difference} over {difference.pairs} pairs: {word} than the control"


def _left_out(results: Results) -> list[str]:
    return ["", "left out:", *(f"  {line}" for line in results.left_out)] * bool(results.left_out)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
