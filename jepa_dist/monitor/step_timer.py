"""Time per phase of a step, tokens per second, and the rolling token digest (honest numbers)."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

# Training phases of a step, in order; time in other phases is not training time.
TRAINING_PHASES = ("data_wait", "forward", "backward", "communication", "optimizer")
_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Place:
    """A rank's current position in the run."""

    count: int
    """Phases entered so far; all ranks enter the same ones, so the lowest count is behind."""
    step: int
    phase: str


class StepTimer:
    """Timer of the steps between two records; tokens per second count training time only.

    Args:
        tokens_per_step: Tokens in the global batch.
        device: On CUDA, training phases are timed on the device, by events that are read only when
            a record is made. The wait for data is always timed on the host.
    """

    def __init__(self, tokens_per_step: int, device: torch.device) -> None:
        self._tokens_per_step = tokens_per_step
        self._on_cuda = device.type == "cuda"
        self._rates: list[float] = []
        self.place = Place(0, 0, "start")
        self._phase: str | None = None
        self.start()

    def start(self) -> None:
        """Start timing: training begins now."""
        self._started = time.perf_counter()
        self._begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the time within this context as ``time/NAME``, not as the enclosing phase's."""
        around, self._phase = self._phase, name
        self.place = Place(self.place.count + 1, self.place.step, name)
        start = time.perf_counter()
        events = self._events(name, around)
        with torch.profiler.record_function(name) if _is_profiling() else nullcontext():
            yield
        self._add(name, around, time.perf_counter() - start)
        if events is not None:
            events[1].record()
        self._phase = around
        if around is not None:
            self.place = Place(self.place.count, self.place.step, around)

    def communication(self) -> AbstractContextManager[None]:
        """Return the phase ``communication``, for use within forward and backward of a step that
        times it (see ``step``); elsewhere, e.g. in an evaluation, a null context."""
        is_timed = self._times_communication and self._phase in _PASSES
        return self.phase("communication") if is_timed else nullcontext()

    def still_alive(self) -> None:
        """Record progress within a long phase; call at the same points on every rank."""
        self.place = Place(self.place.count + 1, self.place.step, self.place.phase)

    def step(self, step: int, *, saving: bool = False, times_communication: bool = False) -> None:
        """Begin an optimizer step.

        Args:
            step: Its number.
            saving: Whether a checkpoint is being written.
            times_communication: Whether to time this step's communication, at dozens of points.
                Some of a lap's steps suffice; their mean is used for the others.
        """
        self._end_step()
        self._saving = saving
        self._times_communication = times_communication
        self._timed_steps += times_communication
        self._steps += 1
        self.place = Place(self.place.count, step, "step")

    def lap(self) -> dict[str, float]:
        """Return means over the steps since the last lap; on CUDA, synchronize the device first.

        Returns:
            Seconds per step, training only (``time/step``) and by phase, trained tokens per
            second, and the slowdown of steps while a checkpoint was written.
        """
        self._end_step()
        self._read_events()
        self._set_communication_apart()
        elapsed = time.perf_counter() - self._lap_started
        training = elapsed - self._off_training()
        rate = self._steps * self._tokens_per_step / training
        self._rates.append(rate)
        phases = {name: seconds / self._steps for name, seconds in self._seconds.items()}
        result = {
            "tokens_per_second": rate,
            "time/step": training / self._steps,
            **{f"time/{name}": seconds for name, seconds in phases.items()},
            "time/other": max(0.0, elapsed / self._steps - sum(phases.values())),
            **self._slowdown(),
        }
        self._begin()
        return result

    def summary(self) -> dict[str, float | None]:
        """Return median tokens/s over the laps (without the first, which compiles) and total
        seconds."""
        rates = self._rates[1:] or self._rates
        return {
            "tokens_per_second": statistics.median(rates) if rates else None,
            "seconds": time.perf_counter() - self._started,
        }

    def _begin(self) -> None:
        self._lap_started = time.perf_counter()
        self._steps = 0
        self._timed_steps = 0
        self._times_communication = False
        self._seconds = dict.fromkeys(TRAINING_PHASES, 0.0)
        self._exposed = dict.fromkeys(_PASSES, 0.0)
        self._pairs: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._step_began: tuple[float, float] | None = None
        self._saving = False
        self._durations: dict[bool, list[float]] = {False: [], True: []}

    def _off_training(self) -> float:
        return sum(s for name, s in self._seconds.items() if name not in TRAINING_PHASES)

    def _end_step(self) -> None:
        now = (time.perf_counter(), self._off_training())
        if self._step_began is not None:
            began, off_training = self._step_began
            self._durations[self._saving].append(now[0] - began - (now[1] - off_training))
        self._step_began = now

    def _slowdown(self) -> dict[str, float]:
        saving, quiet = self._durations[True], self._durations[False]
        if not saving or not quiet:
            return {}
        return {"checkpoint/slowdown": statistics.mean(saving) / statistics.median(quiet)}

    def _add(self, name: str, around: str | None, seconds: float) -> None:
        if name == "communication" and around is not None:
            self._exposed[around] += seconds
            return
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if around is not None:
            self._seconds[around] = self._seconds.get(around, 0.0) - seconds

    def _set_communication_apart(self) -> None:
        """Move communication time, scaled from the timed steps to all, from the passes to its own
        phase."""
        for around, seconds in self._exposed.items():
            exposed = seconds * self._steps / max(1, self._timed_steps)
            exposed = min(exposed, self._seconds[around])
            self._seconds[around] -= exposed
            self._seconds["communication"] += exposed

    def _events(
        self, name: str, around: str | None
    ) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if not self._on_cuda or name not in TRAINING_PHASES or name == "data_wait":
            return None
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._pairs.append((name, around, begin, end))
        return begin, end

    def _read_events(self) -> None:
        """Replace the host's times by those measured on the device."""
        for name in {name for name, *_ in self._pairs}:
            self._seconds[name] = 0.0
        if self._pairs:
            self._exposed = dict.fromkeys(_PASSES, 0.0)
        for name, around, begin, end in self._pairs:
            self._add(name, around, begin.elapsed_time(end) / 1000)


def _is_profiling() -> bool:
    """Return whether a profiler is running; ``record_function`` costs host time even without."""
    return torch.autograd.profiler._is_profiler_enabled


class RollingDigest:
    """Digest chained over its inputs; the digest is its whole state."""

    def __init__(self, so_far: str = "") -> None:
        self._digest = bytes.fromhex(so_far)

    def update(self, data: bytes) -> None:
        """Add one step's data."""
        self._digest = hashlib.blake2b(self._digest + data, digest_size=16).digest()

    def hex(self) -> str:
        """Return the digest as 32 hexadecimal digits (empty before the first step)."""
        return self._digest.hex()
