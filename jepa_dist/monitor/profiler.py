"""Traces of single steps: time of every operator and kernel, from torch.profiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from jepa_dist.config import ProfileConfig

log = logging.getLogger(__name__)

_TABLE_ROWS = 60


class StepProfiler:
    """Tracer of some steps of this rank, writing to ``RUN/profile``; a context manager.

    ``rank_<r>.json.gz`` opens in Perfetto (ui.perfetto.dev) and has the names of a step's phases;
    ``rank_<r>.txt`` is a table of the most expensive operators.

    Args:
        config: Which steps to trace, on which ranks.
        run_dir: The run.
        rank: This rank.
        say: Prints a message for the user.
    """

    def __init__(
        self, config: ProfileConfig, run_dir: Path, rank: int, say: Callable[[str], None] = print
    ) -> None:
        self._begin, self._end = config.start, config.start + config.steps
        self._is_chosen = config.steps > 0 and rank in config.ranks
        self._folder = run_dir / "profile"
        self._name = f"rank_{rank}"
        self._say = say
        self._steps = 0
        self._profile: profile | None = None

    def step(self) -> None:
        """Begin a step: start or stop tracing if it is due.

        No collective should be in flight: a gloo thread that reports its first event while a trace
        is being stopped makes torch (2.13) lose all events of other threads.
        """
        if not self._is_chosen:
            return
        if self._steps == self._begin:
            self._profile = profile(activities=_activities(), acc_events=True)
            self._profile.start()
        elif self._steps == self._end:
            self._finish()
        self._steps += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the trace of a run that ends within the steps to be traced."""
        if error is None:
            self._finish()

    def _finish(self) -> None:
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        done.stop()
        trace = self._folder / f"{self._name}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(trace))
            trace.with_name(f"{self._name}.txt").write_text(_table(done), encoding="utf-8")
        except (OSError, RuntimeError) as problem:  # must not end training
            log.warning("the profile cannot be written: %s", problem)
            self._say(f"warning: the profile cannot be written: {problem}")
        else:
            self._say(f"profile of {self._steps - self._begin} steps: {trace} (ui.perfetto.dev)")


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]


def _table(done: profile) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = f"self_{device}_time_total"
    table: str = done.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
    return table
