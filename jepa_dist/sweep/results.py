"""Results of a sweep: differences to the control, paired by seed.

A pair counts only if both runs are finished, used this list's settings in every start, computed in
the same way (precision, device, versions) and consumed the same tokens in the same order
(``tokens_digest``). A member that diverged has no value; it counts against its arm. What the
differences show: ``verdicts.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_dist.config import flatten, load
from jepa_dist.config.kinds import LAYOUT, WATCHING
from jepa_dist.errors import UserError
from jepa_dist.files import MIB, check_regular, read_json
from jepa_dist.monitor.evaluation_file import (
    EVALUATION,
    quantized_input,
    quantized_name,
    read_evaluation,
)
from jepa_dist.monitor.history import StartRecord, lasting, read_starts
from jepa_dist.monitor.metrics_file import HELD_BYTES, METRICS, number, read_records
from jepa_dist.sweep.members import CONTROL, Member, Settings, quantized_inputs, settings_of

_DATA_BYTES = 64 * MIB
_METRICS = ("val/bpb", "val/loss")
_EVALUATED_ON = "evaluated_on"

Record = dict[str, Any]


@dataclass
class Results:
    """Closing records of the finished members, and the members without one."""

    arms: list[str]
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    """By arm and seed: the last record, extended by the run's best validation."""
    diverged: dict[tuple[str, int], str] = field(default_factory=dict)
    """By arm and seed: the reason why the member diverged."""
    left_out: list[str] = field(default_factory=list)
    """One line for each member that is not counted, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Messages about counted members whose settings are not fully known."""
    margins: Mapping[str, float] = field(default_factory=dict)
    """By metric: differences within +- this are declared to be negligible."""
    widths: Sequence[int] = ()
    """Numbers of bits of the requested results after quantization."""

    @property
    def metric(self) -> str:
        """Bits per byte; nats per token if there is no tokenizer to count bytes with."""
        has_bytes = all(number(record, "val/bpb") is not None for record in self.records.values())
        return "val/bpb" if has_bytes else "val/loss"

    def values(self, arm: str, key: str) -> dict[int, float]:
        """Return a metric of an arm by seed, for finished members that have it."""
        found = {seed: number(r, key) for (name, seed), r in self.records.items() if name == arm}
        return {seed: v for seed, v in found.items() if v is not None and math.isfinite(v)}

    def differences(self, arm: str, key: str) -> tuple[float, ...]:
        """Return an arm's differences to the control (arm - control), one per pair, by seed."""
        ours, control = self.values(arm, key), self.values(CONTROL, key)
        return tuple(ours[seed] - control[seed] for seed in sorted(ours) if seed in control)

    @property
    def evaluated(self) -> list[str]:
        """Names of the metrics that members were evaluated for (docs/evaluation.md)."""
        names = [name for record in self.records.values() for name in record.get(_EVALUATED_ON, ())]
        found = dict.fromkeys(names)
        return [name for name in found if not self._is_repeated(name)]

    @property
    def quantized(self) -> list[str]:
        """Names of the requested metrics after quantization, two for each width: the loss,
        and by how much it is larger than before."""
        names = map(quantized_name, self.widths)
        return [f"{name}/{end}" for name in names for end in (self.metric, "gap")]

    def _is_repeated(self, name: str) -> bool:
        """Return whether accuracy per byte and by the sum are equal in every member, since all
        choices have the same length."""
        total = name.removesuffix("/per_byte")
        return name != total and all(
            record.get(name) == record.get(total) for record in self.records.values()
        )

    def diverged_seeds(self, arm: str) -> list[int]:
        """Return the seeds at which an arm diverged."""
        return [seed for name, seed in self.diverged if name == arm]


class _DivergedError(Exception):
    """A member has no result because its loss did not stay finite."""


def read_results(
    members: Iterable[Member],
    margins: Mapping[str, float] | None = None,
    widths: Sequence[int] = (),
) -> Results:
    """Read the results from the members' run directories.

    Args:
        members: All members of the sweep.
        margins: The sweep's ``equivalence_margin``.
        widths: Numbers of bits of the requested results after quantization.
    """
    members = list(members)
    arms = list(dict.fromkeys(member.arm for member in members))
    results = Results(arms, margins=margins or {}, widths=tuple(dict.fromkeys(widths)))
    for member in members:
        try:
            results.records[member.arm, member.seed] = _read(member, results.widths)
        except UserError as error:
            results.left_out += error.problems
        except _DivergedError as error:
            results.diverged[member.arm, member.seed] = f"{member.run_dir}: diverged: {error}"
    _leave_out_unpaired(results, {member.arm: member.declared for member in members})
    _drop_evaluated_otherwise(results)
    return results


def _read(member: Member, widths: Sequence[int]) -> Record:
    """Return the closing record of a finished member.

    Raises:
        UserError: it is not finished, cannot be read, or had other settings.
        _DivergedError: it diverged.
    """
    run_dir = member.run_dir
    try:
        found = read_records(run_dir / METRICS, HELD_BYTES)
        records = [record for record in found if record is not None]
        starts = lasting(read_starts(run_dir))
    except FileNotFoundError:
        records, starts = [], []
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: cannot be read: {error.strerror}") from None
    if not records:
        raise UserError(f"{run_dir}: not started yet")
    last = records[-1]
    if last.get("diverged") is True:
        _refuse_other_settings(member, starts)
        raise _DivergedError(f"at step {last['step']}: {last.get('reason')}")
    if last.get("final") is not True:
        raise UserError(f"{run_dir}: not finished, at step {last['step']}")
    _refuse_other_settings(member, starts)
    loss = number(last, "val/loss")
    if any(_is_not_finite(number(last, key)) for key in _METRICS):
        raise _DivergedError(f"its last validation loss is {loss}")
    facts = [start.facts for start in starts if start.facts is not None]
    record = last | _best(records)
    return record | _evaluation(member, last, widths) | {"data": _data(run_dir), "facts": facts}


def _evaluation(member: Member, last: Record, widths: Sequence[int]) -> Record:
    """Return the results in ``evaluation.json``, and what each was computed on.

    A damaged file counts as a missing one: ``sweep evaluate`` replaces it. Of quantization, only
    results of ``widths`` with the settings of the sweep are returned.
    """
    try:
        evaluation = read_evaluation(member.run_dir / EVALUATION)
    except UserError:
        evaluation = None
    if evaluation is None or evaluation.step != last["step"]:
        return {_EVALUATED_ON: {}}
    asked = quantized_inputs(widths, member.resolve().quantization)
    quantized = [
        one for one in evaluation.quantized if asked.get(one.name) == quantized_input(one.settings)
    ]
    evaluation = evaluation.model_copy(update={"quantized": quantized})
    metrics = evaluation.metrics()
    return metrics | {_EVALUATED_ON: {name: evaluation.input_of(name) for name in metrics}}


def _is_not_finite(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _data(run_dir: Path) -> Any:
    try:
        return read_json(run_dir / "data.json", _DATA_BYTES)
    except OSError as error:
        problem = error.strerror
    except ValueError:
        problem = "damaged"
    raise UserError(f"{run_dir / 'data.json'}: cannot be read: {problem}")


def _best(records: list[Record]) -> Record:
    """Return the best validation of the run, as early stopping would have given, over records with
    the same validation data as the last one."""
    found = {}
    same = [record for record in records if record.get("val/set") == records[-1].get("val/set")]
    for key in _METRICS:
        values = [number(record, key) for record in same]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        found[f"best/{key}"] = min(finite, default=None)
    return found


def _refuse_other_settings(member: Member, starts: Iterable[StartRecord]) -> None:
    """Raise if a start that contributed steps to the run had other settings than the list."""
    wanted = settings_of(member.resolve())
    config = member.run_dir / "config.yaml"
    try:
        check_regular(config, MIB)
    except OSError as error:
        raise UserError(f"{config}: cannot be read: {error.strerror}") from None
    made_by = settings_of(load(config, environ={}).config)
    configs = [(start.step, _without_own(start.config)) for start in starts if start.config]
    for step, settings in [*configs, (None, made_by)]:
        when = "" if step is None else f" from step {step} on"
        other = [
            f"{key} was {settings.get(key)!r:.80} and is {value!r} in the list"
            for key, value in wanted.items()
            if key in settings and settings[key] != value and not key.startswith(WATCHING + LAYOUT)
        ]
        if other:
            raise UserError(
                f"{member.run_dir}: trained with other settings{when}: {'; '.join(other)}"
            )


def _without_own(config: Mapping[str, Any]) -> Settings:
    """Return a start's settings by dotted key, except those that are set for each member."""
    return {key: value for key, value in flatten(config) if key not in ("seed", "run.dir")}


def _leave_out_unpaired(results: Results, declared: Mapping[str, frozenset[str]]) -> None:
    """Drop runs that consumed other tokens, or computed in another way, than their control."""
    for (arm, seed), record in list(results.records.items()):
        control = results.records.get((CONTROL, seed), record)
        reasons = [
            f"not the {what} of its control"
            for key, what in (("tokens_digest", "tokens"), ("data", "data"), ("val/set", "data"))
            if record.get(key) != control.get(key)
        ]
        reasons += _computed_otherwise(record["facts"], control["facts"], declared[arm])
        if reasons:
            results.left_out.append(f"{arm}, seed {seed}: {'; '.join(dict.fromkeys(reasons))}")
            results.records.pop((arm, seed), None)
        elif not record["facts"]:
            results.notes.append(
                f"{arm}, seed {seed}: trained by a version that does not record precision, device "
                "and versions; these are not compared"
            )


def _drop_evaluated_otherwise(results: Results) -> None:
    """Drop metrics that were computed on another file or layer than the control's."""
    names = dict.fromkeys([*results.evaluated, *results.quantized])
    for (arm, seed), record in results.records.items():
        control = results.records.get((CONTROL, seed), record)
        on, theirs = record[_EVALUATED_ON], control[_EVALUATED_ON]
        other = [name for name in on if name in theirs and on[name] != theirs[name]]
        for name in other:
            del record[name]
        missing = [name for name in names if name not in on]
        if other or missing:
            listed = ", ".join([*other, *missing])
            results.notes.append(
                f"{arm}, seed {seed}: {listed}: not evaluated, or otherwise than its control; "
                "jepa_dist sweep evaluate FILE"
            )


def _computed_otherwise(
    facts: list[Mapping[str, str]], control: list[Mapping[str, str]], declared: frozenset[str]
) -> Iterator[str]:
    """Yield the facts in which two runs differ, or one run between its starts, except those that
    the arm sets."""
    names = dict.fromkeys(name for one in [*facts, *control] for name in one)
    for name in names:
        ours, theirs = ({one.get(name) for one in of} for of in (facts, control))
        if ours != theirs and name not in declared:
            yield f"{name} {_either(ours)}, of its control {_either(theirs)}"
        elif len(ours) > 1:
            yield f"{name} {_either(ours)}, depending on the start"


def _either(values: set[str | None]) -> str:
    return " or ".join(sorted(str(value) for value in values)) or "not known"
