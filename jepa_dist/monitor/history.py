"""The starts of a run: what its interruptions cost, and how often to save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class _StartRecord:
    """One line of ``starts.jsonl``."""

    time: float
    """Seconds since the epoch."""
    step: int
    """Steps done before."""
    world_size: int
    after_failure: bool
    """Whether the start before this one ended otherwise than by itself or on request."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What this start runs with besides its configuration: kernels, versions, variables."""


class RunHistory:
    """All starts of a run; for rank 0. Constructing it appends this one to ``starts.jsonl``.

    Args:
        run_dir: The run.
        step: Steps done before this start.
        world_size: Ranks of this start.
        last_state: ``state`` of the status file that the start before left; None at the first.
        environment: What this start runs with besides its configuration, by name.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        world_size: int,
        last_state: str | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._monotonic = time.monotonic()
        earlier = _read(run_dir / STARTS)
        failed = bool(earlier) and last_state not in ("stopped", "finished")
        now = _StartRecord(time.time(), step, world_size, failed, dict(environment or {}))
        with (run_dir / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(now)) + "\n")
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

    def record(self, productive_seconds: float, save_seconds: float | None) -> dict[str, float]:
        """Metrics.

        Args:
            productive_seconds: Training time of all steps up to now, each counted once.
            save_seconds: That a checkpoint holds the run up; None if that is not known yet.
        """
        wall = self.wall_seconds()
        record = {
            "goodput/productive_share": min(1.0, productive_seconds / wall) if wall else 1.0,
            "goodput/wall_seconds": wall,
            "goodput/starts": float(len(self._starts)),
            "goodput/failures": float(self.failures),
        }
        if save_seconds is not None and self.failures:
            interval = young_interval(save_seconds, wall / self.failures)
            record["checkpoint/young_interval_seconds"] = interval
        return record


def young_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Time between checkpoints that loses least: sqrt(2 * cost of a save * time to failure).

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def _read(path: Path) -> list[_StartRecord]:
    """The starts so far; lines that a crash cut short are left out."""
    if not path.exists():
        return []
    starts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields: dict[str, Any] = json.loads(line)
            starts.append(_StartRecord(**fields))
        except (ValueError, TypeError):
            continue
    return starts
