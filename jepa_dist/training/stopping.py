"""Requests to stop: any rank may receive one, rank 0 puts it into the plan (one plan per step)."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Protocol

from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.parallel.world import World
from jepa_dist.process.signals import STOP_SIGNALS

_PREFIX = "stop/"


class Request(Protocol):
    """This process's request to stop, if it has received one (``signals.StopRequest``)."""

    received: signal.Signals | None


class NoRequest:
    """The request of a run without checkpoints, which signals terminate immediately."""

    received: signal.Signals | None = None


class StopSignals:
    """Distribution of one rank's request to stop to all ranks."""

    def __init__(self, request: Request, world: World, meter: StepTimer) -> None:
        self._request = request
        self._world = world
        self._meter = meter

    @property
    def is_received(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._request.received is not None

    def is_asked(self) -> bool:
        """Return whether any rank was asked to stop. Collective: waits for all.

        Also reports progress to the watchdog, for long phases.
        """
        self._meter.still_alive()
        return self._world.any(self.is_received)

    def host_contributions(self) -> dict[str, float]:
        """Return which signal this rank has received, for the sum over ranks."""
        received = self._request.received
        return {_PREFIX + number.name: float(number == received) for number in STOP_SIGNALS}


def stop_reason(values: Mapping[str, float]) -> str:
    """Return the reason for a stop from a step's sums over all ranks; empty if there is none."""
    names = [number.name for number in STOP_SIGNALS if values[_PREFIX + number.name] > 0]
    return f"asked to stop ({', '.join(names)})" if names else ""
