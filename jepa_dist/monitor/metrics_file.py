"""The format of ``metrics.jsonl``: one JSON object per logged step, the closing record last.

JSON has no NaN or infinity: such a value is written as null, and its kind in ``not_finite``
(``{"loss/ce": "nan"}``). ``decode`` restores it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from jepa_dist.files import MIB, read_lines

METRICS = "metrics.jsonl"
HELD_BYTES = 512 * MIB
"""Largest file whose records are all held in memory, which takes several times as much: about
200,000 records."""

_NOT_FINITE = "not_finite"
_NAMES = ("nan", "inf", "-inf")
# Step plans carry integers as float64.
_MOST_STEPS = 2**53

Record = Mapping[str, Any]


def encode(record: Record) -> bytes:
    """Return a record as a line of the file."""
    known = record.get(_NOT_FINITE)  # if the record was read from a file
    reasons: dict[str, str] = dict(known) if isinstance(known, dict) else {}
    values = {key: _finite(key, value, reasons) for key, value in record.items()}
    if reasons:
        values[_NOT_FINITE] = reasons
    return (json.dumps(values, allow_nan=False) + "\n").encode()


def _finite(key: str, value: Any, reasons: dict[str, str]) -> Any:
    """Return ``value`` with None for each NaN or infinity, and record its kind in ``reasons``."""
    if isinstance(value, float) and not math.isfinite(value):
        reasons[key] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {name: _finite(f"{key}.{name}", inner, reasons) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(f"{key}.{i}", inner, reasons) for i, inner in enumerate(value)]
    return value


def decode(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if it is invalid (cut short by a crash, or damaged).

    Every record has a valid ``step``. Other values are not validated: read numbers with ``number``.
    """
    try:
        record = _parse(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    if type(step) is not int or not 0 <= step < _MOST_STEPS:
        return None
    reasons = record.get(_NOT_FINITE)
    for key, name in reasons.items() if isinstance(reasons, dict) else ():
        if name in _NAMES and record.get(key, 0) is None:
            record[key] = float(name)
    return record


def _parse(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line)  # slower, but accepts the lone surrogates that json.dumps writes


def read_records(metrics: Path, limit: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the records of a file in order; None for each invalid line.

    Args:
        metrics: The file.
        limit: Maximum size in bytes, for callers that keep all records (``HELD_BYTES``).

    Raises:
        OSError: the file is missing, cannot be read, is not a regular file, or is larger.
    """
    return map(decode, read_lines(metrics, limit))


def number(record: Record, key: str) -> float | None:
    """Return a number of a record; None if ``key`` is missing or not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
