"""The starts of a run: environment of each, goodput, and the optimal checkpoint interval."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from jepa_dist.files import MIB, open_to_append_lines, read_lines

STARTS = "starts.jsonl"
# A line has a few kilobytes.
_MOST_BYTES = 64 * MIB

# Files that a run writes at its end, or every few seconds until then.
_ACTIVITY_FILES = ("metrics.jsonl", "status.json", "heartbeats/rank_*.json")

_Seconds = Annotated[float, Field(ge=0, lt=2**40)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class StartRecord:
    """One line of ``starts.jsonl``. Lines of earlier versions have the first four fields."""

    time: _Seconds
    """Seconds since the epoch."""
    step: _Count
    """Steps completed before."""
    world_size: _Count
    after_failure: bool
    """Whether the previous start failed, i.e. neither finished nor stopped on request."""
    train_seconds: _Seconds = 0.0
    """Training time spent before; for a run that branches off another one, the other's."""
    idle_seconds: _Seconds = 0.0
    """Time between the last activity of the previous start and this start."""
    config: dict[str, Any] | None = None
    """The resolved configuration of this start."""
    facts: dict[str, str] | None = None
    """What numbers depend on besides the configuration, by name: values that ``auto`` resolved to,
    the device, and versions of libraries."""
    environment: dict[str, str] | None = None
    """Host, ranks, versions and environment variables of this start."""


_RECORD = TypeAdapter(StartRecord)


class RunHistory:
    """All starts of a run; for rank 0. Constructing it appends this one to ``starts.jsonl``.

    Args:
        run_dir: The run.
        step: Steps done before this start.
        world_size: Ranks of this start.
        last_state: ``state`` in the previous start's status file; None for the first start.
        train_seconds: Training time spent before this start.
        config: Configuration of this start.
        facts: See ``StartRecord``.
        environment: See ``StartRecord``.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        world_size: int,
        last_state: str | None,
        *,
        train_seconds: float = 0.0,
        config: Mapping[str, Any] | None = None,
        facts: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._monotonic = time.monotonic()
        earlier = read_starts(run_dir)
        now = StartRecord(
            time=time.time(),
            step=step,
            world_size=world_size,
            after_failure=bool(earlier) and last_state not in ("stopped", "finished"),
            train_seconds=train_seconds,
            idle_seconds=_idle_seconds(run_dir) if earlier else 0.0,
            config=None if config is None else dict(config),
            facts=None if facts is None else dict(facts),
            environment=None if environment is None else dict(environment),
        )
        with open_to_append_lines(run_dir / STARTS) as file:
            file.write((json.dumps(asdict(now)) + "\n").encode())
        self._starts = [*earlier, now]

    @property
    def failures(self) -> int:
        """Number of starts that followed a failure."""
        return sum(start.after_failure for start in self._starts)

    def wall_seconds(self) -> float:
        """Return the time from the first start until now, including time between starts."""
        before = self._starts[-1].time - self._starts[0].time
        # The difference is negative if the host's clock was set back between starts.
        return max(0.0, before) + time.monotonic() - self._monotonic

    def running_seconds(self) -> float:
        """Return the part of ``wall_seconds`` in which the run was running, i.e. could fail."""
        return max(0.0, self.wall_seconds() - sum(start.idle_seconds for start in self._starts))

    def record(self, train_seconds: float, save_seconds: float | None) -> dict[str, float]:
        """Return goodput metrics.

        Args:
            train_seconds: Training time of all steps up to now, each counted once; the time of a
                run that this one branches off is subtracted here.
            save_seconds: Time that a save blocks training; None if not known yet.
        """
        wall = self.wall_seconds()
        productive = max(0.0, train_seconds - self._starts[0].train_seconds)
        record = {
            "goodput/productive_share": min(1.0, productive / wall) if wall else 1.0,
            "goodput/wall_seconds": wall,
            "goodput/starts": float(len(self._starts)),
            "goodput/failures": float(self.failures),
        }
        if save_seconds is not None and self.failures:
            interval = young_interval(save_seconds, self.running_seconds() / self.failures)
            record["checkpoint/young_interval_seconds"] = interval
        return record


def young_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Return the checkpoint interval that minimizes lost time: sqrt(2 * save time * MTBF).

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def read_starts(run_dir: Path) -> list[StartRecord]:
    """Read the starts so far; invalid lines (cut short by a crash) are skipped.

    Raises:
        OSError: the file exists, but cannot be read, is not a regular file, or is too large.
    """
    starts = []
    with suppress(FileNotFoundError):
        for line in read_lines(run_dir / STARTS, _MOST_BYTES):
            with suppress(ValueError):  # pydantic's error is one
                starts.append(_RECORD.validate_json(line))
    return starts


def lasting(starts: Sequence[StartRecord]) -> list[StartRecord]:
    """Return the starts that contributed steps to the run: a start is dropped if a later one began
    at the same step or an earlier one."""
    kept: list[StartRecord] = []
    for start in reversed(starts):
        if not kept or start.step < kept[-1].step:
            kept.append(start)
    return kept[::-1]


def _idle_seconds(run_dir: Path) -> float:
    """Return the time since the run last wrote one of its activity files; 0 if there is none."""
    times = []
    for pattern in _ACTIVITY_FILES:
        for path in run_dir.glob(pattern):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else 0.0
