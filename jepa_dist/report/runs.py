"""Reading run directories: forgiving with damaged lines, strict about which run is meant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from jepa_dist.config import flatten
from jepa_dist.errors import UserError
from jepa_dist.monitor.run_dir import current_status

Array = NDArray[np.float64]
Record = Mapping[str, Any]

COSINES = "jepa/cos_table"

_NO_RECORDS = "no step is recorded yet; wait for the first (train.log_every)"


@dataclass(frozen=True)
class Series:
    """One metric of a run.

    Args:
        steps: float64 [N], increasing; where the metric was recorded.
        values: float64 [N]; may hold NaN and infinities.
    """

    steps: Array
    values: Array

    def at(self, step: float) -> float | None:
        """The value recorded at this step, if there is one."""
        found = np.flatnonzero(self.steps == step)
        return float(self.values[found[0]]) if len(found) else None


@dataclass(frozen=True)
class Run:
    """What a run directory says.

    Args:
        label: Short name, unlike those of the other runs, printable.
        records: The logged steps in order, without the closing record.
        final: The closing record, empty unless the run is finished.
        config: Values by dotted key.
        data: ``data.json``, by split.
        status: ``status.json``; of a run that was killed, what its lock and checkpoints say.
        written: Time of the last record, in seconds since 1970.
        notes: What was wrong with the files, for people.
    """

    label: str
    records: Sequence[Record]
    final: Record
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    status: Mapping[str, Any]
    written: float
    series: Mapping[str, Series]
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """The last step that was recorded."""
        return int(self.records[-1]["step"])

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimiser step, if the configuration is known."""
        sequences, length = (self.config.get(key) for key in ("batch.sequences", "model.seq_len"))
        if isinstance(sequences, int) and isinstance(length, int):
            return sequences * length
        return None

    def digest(self, split: str) -> str | None:
        """Fingerprint of the shards of ``train`` or ``val``."""
        entry = self.data.get(split)
        return entry.get("digest") if isinstance(entry, dict) else None

    def tokens_at(self, steps: Array) -> Array | None:
        """Tokens that were trained on, after so many steps."""
        return None if self.tokens_per_step is None else steps * self.tokens_per_step

    def seconds_at(self, steps: Array) -> Array | None:
        """Training time after so many steps, over all starts and without evaluation."""
        if "train_seconds" not in self.series:
            return None
        timed = self.series["train_seconds"]
        return np.interp(steps, timed.steps, timed.values)

    def cosines(self) -> tuple[Array, Array] | None:
        """The last ``jepa/cos_table``: span lengths [L], and mean cos over all places [L]."""
        tables = [record[COSINES] for record in self.records if COSINES in record]
        try:
            lengths, cosines = (np.array(tables[-1][key], np.float64) for key in ("lengths", "cos"))
            return lengths, np.broadcast_to(cosines.mean(axis=1), lengths.shape)
        except (IndexError, KeyError, TypeError, ValueError):  # none, or not such a table
            return None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, in the order given.

    Raises:
        UserError: a directory is none of a run, has no records yet, or is given twice.
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
    if not (path / "metrics.jsonl").is_file():
        begun = (path / "config.yaml").exists()
        return [f"{path}: {_NO_RECORDS if begun else 'not a run directory: no metrics.jsonl'}"]
    return []


def _labels(paths: Sequence[Path]) -> list[str]:
    """Each directory's name, or its whole path where two have the same name."""
    names = Counter(path.name for path in paths)
    return [_printable(path.name if names[path.name] == 1 else str(path)) for path in paths]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _read(path: Path, label: str) -> Run:
    metrics = path / "metrics.jsonl"
    try:
        written = metrics.stat().st_mtime
        records, final, notes = _read_records(metrics)
        config, data, status = (
            _read_mapping(path / name, notes)
            for name in ("config.yaml", "data.json", "status.json")
        )
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return Run(
        label=label,
        records=records,
        final=final,
        config=dict(flatten(config)),
        data=data,
        status={**status, **current_status(path)},
        written=written,
        series=_series(records),
        notes=tuple(notes),
    )


def _read_records(metrics: Path) -> tuple[list[Record], Record, list[str]]:
    """Records by step, the closing record, and a note on the lines that had to be skipped."""
    records: dict[int, Record] = {}
    final: Record = {}
    damaged = []
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None:
                damaged.append(number)
            elif record.get("final"):
                final = record
            else:
                records[record["step"]] = record
    notes = []
    if damaged:
        notes.append(
            f"metrics.jsonl: {len(damaged)} damaged line(s) skipped, the first is line "
            f"{damaged[0]} (a last line may be cut short while the run writes it)"
        )
    return [records[step] for step in sorted(records)], final, notes


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record else None


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A file of YAML or JSON; empty, with a note, if it cannot be used."""
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name}: missing")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name}: damaged, not used")
        return {}
    return {str(key): entry for key, entry in value.items()}


def _series(records: Iterable[Record]) -> dict[str, Series]:
    """The numbers of the records by key; texts and nulls are no points."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if type(value) in (int, float) and key != "step":
                points.setdefault(_printable(key), []).append((record["step"], value))
    return {key: Series(*np.array(pairs, dtype=np.float64).T) for key, pairs in points.items()}
