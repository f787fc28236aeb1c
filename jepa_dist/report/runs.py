"""Read run directories: damaged lines are skipped with a note, wrong paths are errors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_dist.config import flatten, read_mapping
from jepa_dist.errors import UserError, one_line
from jepa_dist.files import MIB, check_regular, read_json
from jepa_dist.monitor.history import StartRecord, lasting, read_starts
from jepa_dist.monitor.metrics_file import HELD_BYTES, METRICS, number, read_records
from jepa_dist.monitor.run_dir import current_status

Array = NDArray[np.float64]
Record = Mapping[str, Any]

COSINES = "jepa/cos_table"
_VALIDATED_ON = "val/set"
_JSON_BYTES = 64 * MIB
# More cells than a table of cosines has.
_MOST_CELLS = 10_000

_NO_RECORDS = "no step is recorded yet; wait for the first record (train.log_every)"


@dataclass(frozen=True)
class Series:
    """One metric of a run.

    Args:
        steps: float64 [N], increasing; where the metric was recorded.
        values: float64 [N]; may contain NaN and infinities.
    """

    steps: Array
    values: Array

    def at(self, step: float) -> float | None:
        """Return the value recorded at this step; None if there is none."""
        found = np.flatnonzero(self.steps == step)
        return float(self.values[found[0]]) if len(found) else None


@dataclass(frozen=True)
class Run:
    """Contents of a run directory.

    Args:
        label: Short printable name, unique among the runs.
        records: The logged steps in order, without the closing record.
        final: The closing record, empty unless the run is finished.
        config: Values by dotted key.
        data: ``data.json``, by split.
        status: ``status.json``; for a run that was killed, derived from its lock and checkpoints.
        starts: Starts that contributed steps to the run.
        settings_changed: Whether settings differed between those starts (``notes`` list them).
        written: Unix time of the last record.
        notes: Messages about problems with the files and changed settings.
    """

    label: str
    records: Sequence[Record]
    final: Record
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    status: Mapping[str, Any]
    starts: Sequence[StartRecord]
    settings_changed: bool
    written: float
    series: Mapping[str, Series]
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """Last recorded step."""
        return int(self.records[-1]["step"])

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens per optimizer step; None if the configuration is not known."""
        sequences, length = (self.config.get(key) for key in ("batch.sequences", "model.seq_len"))
        if isinstance(sequences, int) and isinstance(length, int):
            return sequences * length
        return None

    def digest(self, split: str) -> str | None:
        """Return the fingerprint of the shards of ``train`` or ``val``."""
        entry = self.data.get(split)
        return entry.get("digest") if isinstance(entry, dict) else None

    def validated_on(self) -> str | None:
        """Return an id of the validation data (shards and number of sequences); None if unknown."""
        for record in reversed(self.records):
            recorded = record.get(_VALIDATED_ON)
            if isinstance(recorded, str):
                return recorded
        digest, sequences = self.digest("val"), self.config.get("eval.sequences", 0)
        return None if digest is None else f"{digest}:{sequences}"

    def tokens_at(self, steps: Array) -> Array | None:
        """Return the number of tokens trained on after each of ``steps``: from the recorded metric
        if there is one, since the batch size may have changed, else from the configuration."""
        if "tokens" in self.series:
            counted = self.series["tokens"]
            origin = [0.0] if counted.steps[0] > 0 else []
            return np.interp(steps, [*origin, *counted.steps], [*origin, *counted.values])
        return None if self.tokens_per_step is None else steps * self.tokens_per_step

    def facts(self) -> dict[str, str]:
        """Return what numbers depend on besides the configuration, by name; values that differ
        between starts are joined; empty if the run has not recorded them."""
        recorded = [start.facts for start in self.starts if start.facts is not None]
        names = dict.fromkeys(name for facts in recorded for name in facts)
        return {
            name: " / ".join(dict.fromkeys(facts.get(name, "?") for facts in recorded))
            for name in names
        }

    def seconds_at(self, steps: Array) -> Array | None:
        """Return the training time after each of ``steps``, over all starts, without evaluation."""
        if "train_seconds" not in self.series:
            return None
        timed = self.series["train_seconds"]
        return np.interp(steps, timed.steps, timed.values)

    def cosines(self) -> tuple[Array, Array] | None:
        """Return the last ``jepa/cos_table``: span lengths [L], and mean cos over positions [L]."""
        tables = [record[COSINES] for record in self.records if COSINES in record]
        try:
            lengths, cosines = (np.array(tables[-1][key], np.float64) for key in ("lengths", "cos"))
            if cosines.size > _MOST_CELLS:
                return None
            return lengths, np.broadcast_to(cosines.mean(axis=1), lengths.shape)
        except (
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
        ):  # no table, or an invalid one
            return None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, in the order given.

    Raises:
        UserError: a directory is not a run directory, has no records yet, or is given twice.
    """
    resolved = [path.expanduser().resolve() for path in paths]
    problems = [problem for path in resolved for problem in _problems(path)]
    problems += [f"{path}: given twice" for path, count in Counter(resolved).items() if count > 1]
    if problems:
        raise UserError(*problems)
    runs = [_read(path, label) for path, label in zip(resolved, _labels(resolved), strict=True)]
    empty = [f"{run.label}: {_NO_RECORDS}" for run in runs if not run.records]
    if empty:
        raise UserError(*empty)
    return runs


def _problems(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"{path}: no such run directory"]
    try:
        check_regular(path / METRICS)
    except FileNotFoundError:
        begun = (path / "config.yaml").exists()
        return [f"{path}: {_NO_RECORDS if begun else 'not a run directory: no metrics.jsonl'}"]
    except OSError as error:
        return [f"{path / METRICS}: {error.strerror}"]
    return []


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return each directory's name, or its full path if another one has the same name."""
    names = Counter(path.name for path in paths)
    return [_printable(path.name if names[path.name] == 1 else str(path)) for path in paths]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _read(path: Path, label: str) -> Run:
    metrics = path / METRICS
    try:
        written = metrics.stat().st_mtime
        records, final, notes = _read_records(metrics)
        starts = lasting(read_starts(path))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    config, data, status = (
        _read_mapping(path / name, notes) for name in ("config.yaml", "data.json", "status.json")
    )
    changes = _changes(starts)
    notes += changes
    records = _validated_alike(records, notes)
    return Run(
        label=label,
        records=records,
        final=final,
        config=dict(flatten(config)),
        data=data,
        status={**status, **current_status(path)},
        starts=starts,
        settings_changed=bool(changes),
        written=written,
        series=_series(records),
        notes=tuple(map(one_line, notes)),
    )


def _read_records(metrics: Path) -> tuple[list[Record], Record, list[str]]:
    """Return the records by step, the closing record, and notes, e.g. on skipped lines."""
    records: dict[int, Record] = {}
    final: Record = {}
    damaged, notes = [], []
    for line, record in enumerate(read_records(metrics, HELD_BYTES), start=1):
        if record is None:
            damaged.append(line)
        elif record.get("final"):
            final = record
        elif record.get("diverged"):
            notes.append(f"diverged after step {record['step']}: {record.get('reason')}")
        else:
            records[record["step"]] = record
    if damaged:
        notes.append(
            f"metrics.jsonl: {len(damaged)} damaged line(s) skipped, the first is line "
            f"{damaged[0]} (a last line may be cut short while the run writes it)"
        )
    return [records[step] for step in sorted(records)], final, notes


def _changes(starts: Sequence[StartRecord]) -> list[str]:
    """Return one line per setting that changed between starts, except where it saves and logs."""
    configs = [(start.step, dict(flatten(start.config))) for start in starts if start.config]
    return [
        f"{key} changed from {before.get(key)!r:.80} to {now.get(key)!r:.80} at step {step}"
        for (_, before), (step, now) in itertools.pairwise(configs)
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
        and not key.startswith(("run.", "checkpoint.", "monitor.", "train.stop_at"))
    ]


def _validated_alike(records: list[Record], notes: list[str]) -> list[Record]:
    """Return the records without ``val/*`` measured on other data than the last validation's."""
    sets = [record[_VALIDATED_ON] for record in records if _VALIDATED_ON in record]
    other = [r["step"] for r in records if _VALIDATED_ON in r and r[_VALIDATED_ON] != sets[-1]]
    if not other:
        return records
    notes.append(f"val/* up to step {other[-1]} omitted: validated on other data than later")
    return [
        {key: value for key, value in record.items() if not key.startswith("val/")}
        if record["step"] in other
        else record
        for record in records
    ]


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a YAML or JSON mapping; return an empty one, with a note, if it cannot be used."""
    if not path.exists():
        notes.append(f"{path.name}: missing")
        return {}
    try:
        check_regular(path, _JSON_BYTES)
        value = read_json(path, _JSON_BYTES) if path.suffix == ".json" else read_mapping(path)
    except (OSError, ValueError, UserError):
        value = None
    if not isinstance(value, dict) or not value:
        notes.append(f"{path.name}: damaged, not used")
        return {}
    return value


def _series(records: Iterable[Record]) -> dict[str, Series]:
    """Return the records' numbers by key; strings and nulls are skipped."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key in record:
            value = number(record, key)
            if value is not None and key != "step":
                points.setdefault(_printable(key), []).append((record["step"], value))
    return {key: Series(*np.array(pairs, dtype=np.float64).T) for key, pairs in points.items()}
