"""Receivers of a run's reports: a publisher of records and a profiler. Both may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jepa_dist.optim.histograms import Distribution


class Publisher(Protocol):
    """Publisher of a run's messages and records (``monitor.reporter.Reporter``); on rank 0."""

    def say(self, text: str) -> None:
        """Print a line."""

    def step(self, record: Mapping[str, Any] | None) -> None:
        """Note that a step is done; ``record`` is None unless the step is logged."""

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        """Publish distributions of parameters and gradients after ``step`` steps."""

    def go_back(self, step: int, why: str) -> None:
        """Drop what was recorded after ``step``: the run continues from there."""


class Silent:
    """A publisher that publishes nothing; base class of those that publish a part."""

    def say(self, text: str) -> None:
        """Ignore the line."""

    def step(self, record: Mapping[str, Any] | None) -> None:
        """Ignore the record."""

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        """Ignore the distributions."""

    def go_back(self, step: int, why: str) -> None:
        """Ignore the roll-back."""


SILENT = Silent()


class Profiler(Protocol):
    """A profiler of steps (``monitor.profiler.StepProfiler``)."""

    def step(self) -> None:
        """Note that a step begins."""


class NoProfiler:
    """A profiler that traces nothing."""

    def step(self) -> None:
        """Ignore the step."""


NO_PROFILER = NoProfiler()
