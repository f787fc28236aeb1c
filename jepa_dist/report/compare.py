"""Comparison of runs in numbers, and whether they are comparable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jepa_dist.monitor.metrics_file import number
from jepa_dist.report.runs import Array, Run

# Keys that always differ between runs.
_NOT_COMPARED = {"run.dir"}
_NONE = "-"

Rows = list[tuple[str, list[str]]]


def metric(runs: Sequence[Run], average: str = "") -> str:
    """Return the main validation metric: bits per byte, or the loss if there is no tokenizer.

    Args:
        runs: All runs.
        average: ``ema_`` for the averaged weights.
    """
    has_bytes = any("val/bpb" in run.series for run in runs)
    return f"val/{average}bpb" if has_bytes else f"val/{average}loss"


def pairing(runs: Sequence[Run]) -> list[str]:
    """Return reasons why a difference to the first run may have other causes than the
    configuration; empty if the runs are paired."""
    first, *others = runs
    return [f"{run.label}: {reason}" for run in others for reason in _mismatches(first, run)]


def config_differences(runs: Sequence[Run]) -> Rows:
    """Return the keys whose values differ between runs, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [_shown(run.config, key) for run in runs]) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1 and key not in _NOT_COMPARED]


def difference(first: Run, other: Run, key: str) -> tuple[Array, Array]:
    """Return the steps at which both runs recorded the metric, and ``other`` minus ``first``.

    Both are empty if the validation data differ.
    """
    has_both = key in first.series and key in other.series
    if not has_both or first.validated_on() != other.validated_on():
        return np.empty(0), np.empty(0)
    one, two = first.series[key], other.series[key]
    steps, in_one, in_two = np.intersect1d(one.steps, two.steps, return_indices=True)
    with np.errstate(invalid="ignore"):  # inf - inf
        return steps, two.values[in_two] - one.values[in_one]


def summary(runs: Sequence[Run]) -> Rows:
    """Return the rows of the summary table: name, and one cell per run."""
    live, averaged = metric(runs), metric(runs, "ema_")
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("state", _state),
        ("steps", _steps),
        ("last record", lambda run: time.strftime("%F %H:%M UTC", time.gmtime(run.written))),
        (live, lambda run: _last(run, live)),
        (averaged, lambda run: _last(run, averaged)),
        (f"best {live}", lambda run: _best(run, live)),
        (f"{live}, difference to {runs[0].label}", lambda run: _last_gap(runs[0], run, live)),
        (
            f"{averaged}, difference to {runs[0].label}",
            lambda run: _last_gap(runs[0], run, averaged),
        ),
        ("tokens/s, median", lambda run: _median(run, "tokens_per_second", "{:,.0f}")),
        ("MFU, median", lambda run: _median(run, "mfu", "{:.1%}")),
        ("training time", lambda run: _newest(run, "train_seconds", _duration)),
        ("wall time", lambda run: _newest(run, "goodput/wall_seconds", _duration)),
        ("goodput", lambda run: _newest(run, "goodput/productive_share", "{:.1%}".format)),
        ("starts", lambda run: _newest(run, "goodput/starts", "{:.0f}".format)),
        ("of these after failures", lambda run: _newest(run, "goodput/failures", "{:.0f}".format)),
        ("n-gram baselines", _baselines),
        ("not finite", _not_finite),
        ("notes", lambda run: "; ".join(run.notes) or _NONE),
    ]
    cells = [(name, [cell(run) for run in runs]) for name, cell in rows]
    return [(name, row) for name, row in cells if set(row) != {_NONE}]


def _mismatches(first: Run, run: Run) -> Iterator[str]:
    facts: list[tuple[str, Callable[[Run], Any]]] = [
        ("seed", lambda run: run.config.get("seed")),
        ("training data", lambda run: run.digest("train")),
        ("validation data", lambda run: run.validated_on()),
        ("train.steps", lambda run: run.config.get("train.steps")),
        ("tokens per step", lambda run: run.tokens_per_step),
        ("last recorded step", lambda run: run.last_step),
    ]
    changed = [one.label for one in (first, run) if one.settings_changed]
    if changed:
        yield f"settings changed during {', '.join(dict.fromkeys(changed))} (see notes)"
    mine, theirs = run.facts(), first.facts()
    for name in dict.fromkeys([*mine, *theirs]) if mine and theirs else ():
        if mine.get(name) != theirs.get(name) or " / " in mine[name]:
            yield f"{name} {mine.get(name)} against {theirs.get(name)}"
    for name, fact in facts:
        value, other = fact(run), fact(first)
        if value is None or other is None:
            yield f"{name} not known"
        elif value != other:
            yield f"{name} {value} against {other}"
    step = other_tokens(first, run)
    if step is not None:
        yield f"trained on different tokens (tokens_digest at step {step})"


def other_tokens(first: Run, run: Run) -> int | None:
    """Return the last step that both runs recorded if their token digests differ there, else
    None."""
    digests = {record["step"]: record.get("tokens_digest") for record in first.records}
    for record in reversed(run.records):
        known = digests.get(record["step"])
        if known is not None and "tokens_digest" in record:
            return record["step"] if record["tokens_digest"] != known else None
    return None


def _shown(config: Mapping[str, Any], key: str) -> str:
    return str(config[key]) if key in config else _NONE


def _state(run: Run) -> str:
    state, reason = run.status.get("state", "unknown"), run.status.get("reason")
    return f"{state}: {reason}" if reason else str(state)


def _steps(run: Run) -> str:
    planned = number(run.config, "train.steps")
    return f"{run.last_step:,}" + ("" if planned is None else f" of {planned:,.0f}")


def _last(run: Run, key: str) -> str:
    if key not in run.series:
        return _NONE
    series = run.series[key]
    return f"{series.values[-1]:.4f} at step {series.steps[-1]:,.0f}"


def _best(run: Run, key: str) -> str:
    series = run.series.get(key)
    if series is None or not np.isfinite(series.values).any():
        return _NONE
    at = np.argmin(np.where(np.isfinite(series.values), series.values, np.inf))
    return f"{series.values[at]:.4f} at step {series.steps[at]:,.0f}"


def _last_gap(first: Run, run: Run, key: str) -> str:
    """Return the difference at the last step at which both runs have validated."""
    steps, gaps = difference(first, run, key)
    if run is first or not len(steps):
        return _NONE
    return f"{gaps[-1]:+.4f} at step {steps[-1]:,.0f}"


def _median(run: Run, key: str, form: str) -> str:
    """Return the median over all records but the first, whose steps include compilation."""
    if key not in run.series:
        return _NONE
    values = run.series[key].values
    return form.format(np.median(values[1:] if len(values) > 1 else values))


def _newest(run: Run, key: str, shown: Callable[[float], str]) -> str:
    return shown(float(run.series[key].values[-1])) if key in run.series else _NONE


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _baselines(run: Run) -> str:
    numbers = ((key, number(run.final, key)) for key in run.final)
    found = [(k, value) for k, value in numbers if k.startswith("baseline/") and value is not None]
    shown = [f"{key.removeprefix('baseline/')} {value:.4f}" for key, value in found]
    return ", ".join(shown) or _NONE


def _not_finite(run: Run) -> str:
    first = {key: s.steps[~np.isfinite(s.values)] for key, s in run.series.items()}
    shown = [f"{key} from step {steps[0]:,.0f}" for key, steps in first.items() if len(steps)]
    return ", ".join(shown) or _NONE
