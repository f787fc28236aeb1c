"""Conclusions of a sweep: a table of the arms, evidence for each metric, and a verdict per arm.

An arm is *better* or *worse* than the control if the paired t-test says so at 5 %, after Holm's
correction over the arms; *equivalent* if the sweep declares a margin for the metric and two
one-sided tests at 5 % show that the difference lies within it; else *undecided*. An arm that
diverged at a seed where the control did not is worse, whatever its other seeds show.

That verdict is on the loss. Accuracies, the rank and anisotropy of the states, and loss and gap
after quantization have a table and verdicts of their own, corrected over the arms, not over the
metrics.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jepa_dist.sweep.members import CONTROL
from jepa_dist.sweep.paired import (
    LEVEL,
    detectable_effect,
    equivalence_p,
    holm,
    mean_interval,
    paired_t_p,
    pairs_to_decide,
    repeatable_p,
    sign_flip_p,
    standard_error,
)
from jepa_dist.sweep.results import Results


@dataclass(frozen=True)
class Evidence:
    """The paired differences of an arm in one metric, and their tests."""

    differences: tuple[float, ...]
    """At least one, by seed."""
    margin: float | None
    p: float | None
    """Of the paired t-test; None with one pair."""
    corrected_p: float | None
    """After Holm's correction over the arms."""
    if_above: str = "worse"
    """Word for an arm whose values are above the control's."""
    if_below: str = "better"

    @property
    def mean(self) -> float:
        """Mean difference (arm - control)."""
        return statistics.fmean(self.differences)

    @property
    def is_different(self) -> bool:
        """Whether the mean differs from zero."""
        return self.corrected_p is not None and self.corrected_p <= LEVEL

    @property
    def is_equivalent(self) -> bool:
        """Whether the mean lies within the margin."""
        if self.margin is None:
            return False
        p = equivalence_p(self.differences, self.margin)
        return p is not None and p <= LEVEL

    @property
    def verdict(self) -> str:
        """One of better, worse, equivalent within the margin, undecided."""
        if self.is_different:
            return f"{self.if_below if self.mean < 0 else self.if_above} than the control"
        if self.is_equivalent:
            return f"equivalent to the control within {self.margin:g}"
        if self.p is None:
            return "undecided: one pair has no estimate of the noise"
        more = pairs_to_decide(self.differences, self.margin)
        if more is None:
            return "undecided: no feasible number of pairs would decide"
        return f"undecided: {more} more pair{'s' * (more > 1)} would decide"

    def __str__(self) -> str:
        """Mean difference and its standard error."""
        if len(self.differences) == 1:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} +- {standard_error(self.differences):.4f}"


def evidence(results: Results, metric: str) -> dict[str, Evidence]:
    """Return the evidence on each arm that has a pair, by arm."""
    found = {
        arm: results.differences(arm, metric)
        for arm in results.arms
        if arm != CONTROL and results.differences(arm, metric)
    }
    raw = {arm: paired_t_p(differences) for arm, differences in found.items()}
    tested = {arm: p for arm, p in raw.items() if p is not None}
    corrected = dict(zip(tested, holm([*tested.values()]), strict=True))
    margin = results.margins.get(metric)
    words = _words(metric)
    return {
        arm: Evidence(differences, margin, raw[arm], corrected.get(arm), *words)
        for arm, differences in found.items()
    }


def _words(metric: str) -> tuple[str, str]:
    """Return the words for values above and below the control's."""
    if metric.startswith("states/"):
        return "higher", "lower"
    is_accuracy = metric.startswith(("task/", "linear_probe/"))
    return ("better", "worse") if is_accuracy else ("worse", "better")


def undecided_arms(results: Results) -> list[str]:
    """Return the arms on which more pairs could still change the verdict, looked at repeatedly.

    By tests that stay valid however often they are made (``paired.repeatable_p``), at 5 % over all
    arms together (Bonferroni).
    """
    arms = [arm for arm in results.arms if arm != CONTROL]
    return [arm for arm in arms if not _is_decided(results, arm, LEVEL / len(arms))]


def _is_decided(results: Results, arm: str, level: float) -> bool:
    if _diverged_alone(results, arm):
        return True
    differences = results.differences(arm, results.metric)
    if repeatable_p(differences) <= level:
        return True
    margin = results.margins.get(results.metric)
    if margin is None or not differences or abs(statistics.fmean(differences)) >= margin:
        return False
    return all(repeatable_p(differences, edge) <= LEVEL for edge in (-margin, margin))


def _diverged_alone(results: Results, arm: str) -> list[int]:
    """Return the seeds at which the arm diverged and the control did not."""
    control = results.diverged_seeds(CONTROL)
    return [seed for seed in results.diverged_seeds(arm) if seed not in control]


# ---------------------------------------------------------------------------- text


def describe(results: Results) -> list[str]:
    """Return the lines of ``jepa_dist sweep results``."""
    if not results.records:
        diverged = [arm for arm in results.arms if results.diverged_seeds(arm)]
        verdicts = [_verdict(results, arm, None) for arm in diverged]
        return ["no member is finished", *verdicts, *_left_out(results)]
    metrics = metrics_of_loss(results.metric)
    by_metric = {metric: evidence(results, metric) for metric in metrics}
    header = ["arm", "seeds", results.metric, "to control", f"best {results.metric}", "EMA"]
    header.append("tokens/s")
    for bits in results.widths:
        header += [f"{bits}-bit {results.metric}", "gap"]
    rows = [header, *(_row(results, arm, by_metric) for arm in results.arms)]
    lines = [
        *_align(rows),
        "",
        "seeds: finished; to control, best, EMA: mean difference to the control over paired seeds",
        "+- its standard error (best: the lowest validation along the run); tokens/s: mean.",
    ]
    if results.widths:
        lines.append("N-bit, gap: after quantization, and how much is lost by it; means.")
    for metric, found in by_metric.items():
        lines += _evidence_table(metric, found)
    arms = [arm for arm in results.arms if arm != CONTROL or results.diverged_seeds(arm)]
    final = by_metric[results.metric]
    lines += ["", *(_verdict(results, arm, final.get(arm)) for arm in arms)]
    for metric in results.evaluated:
        lines += _further_table(results, metric)
    return [*lines, *_left_out(results)]


def metrics_of_loss(metric: str) -> tuple[str, str, str]:
    """Return a validation metric of the final model, of the best point, and of the EMA."""
    return metric, f"best/{metric}", metric.replace("val/", "val/ema_")


def _row(results: Results, arm: str, by_metric: Mapping[str, Mapping[str, Evidence]]) -> list[str]:
    values, diverged = results.values(arm, results.metric), len(results.diverged_seeds(arm))
    return [
        arm,
        f"{len(values)}" + f" + {diverged} diverged" * bool(diverged),
        _mean(values, ".4f"),
        *(str(found[arm]) if arm in found else "" for found in by_metric.values()),
        _mean(results.values(arm, "tokens_per_second"), ",.0f"),
        *(_mean(results.values(arm, name), ".4f") for name in results.quantized),
    ]


def _mean(values: Mapping[int, float], form: str) -> str:
    return format(statistics.fmean(values.values()), form) if values else "-"


def _evidence_table(metric: str, found: Mapping[str, Evidence]) -> list[str]:
    """Return interval, p-values and power of each arm with at least two pairs."""
    header = [metric, "pairs", "95 % interval", "p", "Holm", "sign flips", "any look", "80 % from"]
    rows = [_evidence_row(arm, one) for arm, one in found.items() if len(one.differences) > 1]
    return ["", *_align([header, *rows])] if rows else []


def _evidence_row(arm: str, one: Evidence) -> list[str]:
    differences = one.differences
    interval = mean_interval(differences) or (math.nan, math.nan)
    deviation = standard_error(differences) * math.sqrt(len(differences))
    return [
        arm,
        str(len(differences)),
        f"{interval[0]:+.4f} to {interval[1]:+.4f}",
        *map(_p, (one.p, one.corrected_p, sign_flip_p(differences), repeatable_p(differences))),
        f"{detectable_effect(len(differences)) * deviation:.4f}",
    ]


def _further_table(results: Results, metric: str) -> list[str]:
    """Return means, differences and verdicts of a metric other than the loss, if it has pairs."""
    found = evidence(results, metric)
    if not found:
        return []
    header = [metric, "mean", "to control", "pairs", "95 % interval", "p", "Holm", "verdict"]
    rows = [[CONTROL, _mean(results.values(CONTROL, metric), ".4f"), *[""] * 6]]
    for arm, one in found.items():
        interval = mean_interval(one.differences)
        rows.append(
            [
                *(arm, _mean(results.values(arm, metric), ".4f"), str(one)),
                str(len(one.differences)),
                "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
                *map(_p, (one.p, one.corrected_p)),
                one.verdict,
            ]
        )
    return ["", *_align([header, *rows])]


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _verdict(results: Results, arm: str, found: Evidence | None) -> str:
    diverged = results.diverged_seeds(arm)
    if arm == CONTROL:
        return f"{CONTROL}: diverged at seed {_listed(diverged)}: no pairs there"
    if found is None:
        others = "no pair yet"
    else:
        pairs = len(found.differences)
        others = f"{found} over {pairs} pair{'s' * (pairs > 1)}: {found.verdict}"
    if not diverged:
        return f"{arm}: {others}"
    if _diverged_alone(results, arm):
        worse = ", where the control did not: worse than the control"
        others = others.removesuffix(": better than the control")
    else:
        worse = ", as the control"
    return f"{arm}: diverged at seed {_listed(diverged)}{worse}; the other seeds: {others}"


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _left_out(results: Results) -> list[str]:
    """Return the notes, and the members without a value, with reasons."""
    lines = []
    for title, found in (
        ("not known:", results.notes),
        ("diverged:", list(results.diverged.values())),
        ("left out:", results.left_out),
    ):
        lines += ["", title, *(f"  {line}" for line in found)] * bool(found)
    return lines


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
