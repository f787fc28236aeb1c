"""The starts of a run: with what each was made, what interruptions cost, how often to save."""

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

# What a run leaves when it ends, or until then every few seconds.
_SIGNS_OF_LIFE = ("metrics.jsonl", "status.json", "heartbeats/rank_*.json")

_Seconds = Annotated[float, Field(ge=0, lt=2**40)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class StartRecord:
    """One line of ``starts.jsonl``. Lines of earlier versions have the first four fields."""

    time: _Seconds
    """Seconds since the epoch."""
    step: _Count
    """Steps done before."""
    world_size: _Count
    after_failure: bool
    """Whether the start before this one ended otherwise than by itself or on request."""
    train_seconds: _Seconds = 0.0
    """Training time spent before; of a run that branches off another one, the other's."""
    idle_seconds: _Seconds = 0.0
    """Between the last sign of life of the start before and this one."""
    config: dict[str, Any] | None = None
    """As it was resolved for this start."""
    facts: dict[str, str] | None = None
    """What numbers depend on besides the configuration: what ``auto`` stands for, the device, and
    the versions of libraries, by name."""
    environment: dict[str, str] | None = None
    """Host, ranks, versions and variables that this start ran with."""


_RECORD = TypeAdapter(StartRecord)


class RunHistory:
    """All starts of a run; for rank 0. Constructing it appends this one to ``starts.jsonl``.

    Args:
        run_dir: The run.
        step: Steps done before this start.
        world_size: Ranks of this start.
        last_state: ``state`` of the status file that the start before left; None at the first.
        train_seconds: Training time spent before this start.
        config: Of this start.
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
        """Starts that a failure made necessary."""
        return sum(start.after_failure for start in self._starts)

    def wall_seconds(self) -> float:
        """From the first start until now, whatever was or was not running meanwhile."""
        before = self._starts[-1].time - self._starts[0].time
        # The clock of the host may have been set between starts; time does not run backwards.
        return max(0.0, before) + time.monotonic() - self._monotonic

    def running_seconds(self) -> float:
        """Of these, those in which the run was running: only then it can fail."""
        return max(0.0, self.wall_seconds() - sum(start.idle_seconds for start in self._starts))

    def record(self, train_seconds: float, save_seconds: float | None) -> dict[str, float]:
        """Metrics.

        Args:
            train_seconds: Training time of all steps up to now, each counted once; those of a run
                that this one branches off are taken off here.
            save_seconds: That a checkpoint holds the run up; None if that is not known yet.
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
    """Time between checkpoints that loses least: sqrt(2 * cost of a save * time to failure).

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def read_starts(run_dir: Path) -> list[StartRecord]:
    """The starts so far; lines that a crash cut short are left out.

    Raises:
        OSError: the file is there, but cannot be read, is no regular file, or is far too large.
    """
    starts = []
    with suppress(FileNotFoundError):
        for line in read_lines(run_dir / STARTS, _MOST_BYTES):
            with suppress(ValueError):  # pydantic's error is one
                starts.append(_RECORD.validate_json(line))
    return starts


def lasting(starts: Sequence[StartRecord]) -> list[StartRecord]:
    """Those starts of which steps are left in the run: later ones went back behind none of them."""
    kept: list[StartRecord] = []
    for start in reversed(starts):
        if not kept or start.step < kept[-1].step:
            kept.append(start)
    return kept[::-1]


def _idle_seconds(run_dir: Path) -> float:
    """Since the run last gave a sign of life; 0 where it has left none."""
    times = []
    for pattern in _SIGNS_OF_LIFE:
        for path in run_dir.glob(pattern):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else 0.0
