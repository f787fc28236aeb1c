"""Clocks of a run: phases of steps, training time, the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jepa_dist.monitor.startup import Startup
from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.plan import TrainingClock


@dataclass(frozen=True)
class Times:
    """The clocks of a process."""

    meter: StepTimer
    """Phases of a step, and the place that the watchdog reports."""
    clock: TrainingClock
    """Training time over all starts of the run."""
    startup: Startup
    """Time spent on this start."""

    @contextmanager
    def off_training(self, phase: str) -> Iterator[None]:
        """Report the time inside this context as ``time/PHASE``, not as training time."""
        with self.meter.phase(phase), self.clock.paused():
            yield
