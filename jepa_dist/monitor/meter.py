"""Time and tokens: where a step's time goes, and how fast the run is (contract C8)."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

# Phases of a step that train, as they come; time in others is not training time.
TRAINING_PHASES = ("data_wait", "forward", "backward", "communication", "optimizer")
_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    count: int
    """Phases entered so far. Every rank enters the same ones, so who has the lowest is behind."""
    step: int
    phase: str


class Meter:
    """Measures the stretch of steps between two records; only training counts for its speed.

    Args:
        tokens_per_step: Of the global batch.
        device: On CUDA the training phases are measured there, by events that are read only when
            a record is made. The wait for data is always the host's.
    """

    def __init__(self, tokens_per_step: int, device: torch.device) -> None:
        self._tokens_per_step = tokens_per_step
        self._on_cuda = device.type == "cuda"
        self._rates: list[float] = []
        self.place = Place(0, 0, "start")
        self._phase: str | None = None
        self.start()

    def start(self) -> None:
        """Training begins now."""
        self._started = time.perf_counter()
        self._begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent in here is reported as ``time/NAME``, and not as that of a phase around it."""
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
        """A phase within forward and backward of a step that times it (``step``); elsewhere (in an
        evaluation) it is not set apart."""
        is_timed = self._times_communication and self._phase in _PASSES
        return self.phase("communication") if is_timed else nullcontext()

    def still_alive(self) -> None:
        """A long phase gets on; to be called at the same points on every rank."""
        self.place = Place(self.place.count + 1, self.place.step, self.place.phase)

    def step(self, step: int, *, saving: bool = False, times_communication: bool = False) -> None:
        """An optimiser step begins.

        Args:
            step: Its number.
            saving: Whether a checkpoint is being written.
            times_communication: Whether this step times its communication, at dozens of points.
                Some of a lap's steps are enough: the others are taken to be alike.
        """
        self._end_step()
        self._saving = saving
        self._times_communication = times_communication
        self._timed_steps += times_communication
        self._steps += 1
        self.place = Place(self.place.count, step, "step")

    def lap(self) -> dict[str, float]:
        """Means over the steps since the last lap; on CUDA the device must have been waited for.

        Returns:
            Seconds per step, training only (``time/step``) and by phase, trained tokens per
            second, and how much longer steps took while a checkpoint was written.
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
        """Median tokens/s over the laps (without the first, which compiles) and total seconds."""
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
        """Take out of the passes what their timed steps spent communicating, for all steps."""
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
        """What the device measured takes the place of the host's times."""
        for name in {name for name, *_ in self._pairs}:
            self._seconds[name] = 0.0
        if self._pairs:
            self._exposed = dict.fromkeys(_PASSES, 0.0)
        for name, around, begin, end in self._pairs:
            self._add(name, around, begin.elapsed_time(end) / 1000)


def _is_profiling() -> bool:
    """Whether anybody sees the profiler's ranges, which cost the host time all the same."""
    return torch.autograd.profiler._is_profiler_enabled


class RollingDigest:
    """Digest of everything fed to it, in order; its state is the digest itself."""

    def __init__(self, so_far: str = "") -> None:
        self._digest = bytes.fromhex(so_far)

    def update(self, data: bytes) -> None:
        """Take in one step's share."""
        self._digest = hashlib.blake2b(self._digest + data, digest_size=16).digest()

    def hex(self) -> str:
        """The digest as 32 hexadecimal digits (empty before the first step)."""
        return self._digest.hex()
