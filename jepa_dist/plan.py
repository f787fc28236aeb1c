"""What a step is, decided by rank 0 alone and told to everyone once (contract C2).

Ranks that decide on their own are how distributed jobs hang, so nobody but the ``Planner`` on
rank 0 draws spans or asks whether to evaluate. The broadcast is asked for one step ahead, on a
CPU group: when a step begins, its plan has arrived.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.jepa.spans import sample_spans
from jepa_dist.optim.schedule import jepa_weight, lr_multiplier, muon_momentum, next_phase
from jepa_dist.parallel.world import World

Spans = NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """One optimiser step."""

    step: int
    frac: float
    """Fraction of the run that is over when the step begins."""
    lr_multiplier: float
    muon_momentum: float
    phase: int
    """Recurrence phase of the model."""
    jepa_weight: float
    """Lambda of this step; 0 switches the objective off: no spans, no JEPA region."""
    log: bool
    evaluate: bool
    last: bool
    """The run is complete after this step."""
    save: bool
    """A checkpoint follows this step."""
    stop: bool
    """Training stops after this step: it is the last one, or it was asked to."""
    spans: Spans | None
    """int64 [global batch, spans per sequence, 2], or None while the objective is off."""

    @classmethod
    def of_nothing(cls, phase: int, jepa_weight: float, spans: Spans | None) -> StepPlan:
        """A step that is never taken: what there is to compile, for the warm-up."""
        return cls(
            step=-1,
            frac=0.0,
            lr_multiplier=0.0,
            muon_momentum=0.0,
            phase=phase,
            jepa_weight=jepa_weight,
            log=False,
            evaluate=False,
            last=False,
            save=False,
            stop=False,
            spans=spans,
        )

    def pack(self, span_shape: tuple[int, int, int]) -> Tensor:
        """As one float64 tensor of fixed size (all integers here are far below 2**53)."""
        spans = np.zeros(span_shape) if self.spans is None else self.spans
        header = [float(getattr(self, name)) for name in _HEADER]
        return torch.from_numpy(np.concatenate([header, spans.ravel()]))

    @classmethod
    def unpack(cls, packed: Tensor, span_shape: tuple[int, int, int]) -> StepPlan:
        """The inverse of ``pack``."""
        values = packed.numpy()
        header = dict(zip(_HEADER, values[: len(_HEADER)].tolist(), strict=True))
        spans = values[len(_HEADER) :].astype(np.int64).reshape(span_shape)
        return cls(
            step=int(header["step"]),
            frac=header["frac"],
            lr_multiplier=header["lr_multiplier"],
            muon_momentum=header["muon_momentum"],
            phase=int(header["phase"]),
            jepa_weight=header["jepa_weight"],
            log=bool(header["log"]),
            evaluate=bool(header["evaluate"]),
            last=bool(header["last"]),
            save=bool(header["save"]),
            stop=bool(header["stop"]),
            spans=spans if header["jepa_weight"] > 0 else None,
        )


_HEADER = tuple(field.name for field in fields(StepPlan) if field.name != "spans")


class TrainingClock:
    """Seconds of training: stands still while paused (evaluation)."""

    def __init__(self) -> None:
        self.start()

    def start(self, seconds: float = 0.0) -> None:
        """Begin, at what earlier starts of the run have spent."""
        self._started = time.monotonic() - seconds

    def seconds(self) -> float:
        """Training time so far."""
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began


class Planner:
    """Rank 0's decisions. Of its state a checkpoint keeps the recurrence phase."""

    def __init__(self, config: Config, clock: TrainingClock, phase: int = 0) -> None:
        self._config = config
        self._clock = clock
        self._phase = phase
        self._saved_at = time.monotonic()
        self._stop_requested = False

    def request_stop(self) -> None:
        """Let the next step that is planned be the one to stop after."""
        self._stop_requested = True

    def plan(self, step: int) -> StepPlan:
        """Decide step ``step``; to be asked for steps in order."""
        config = self._config
        train, optim, jepa = config.train, config.optim, config.jepa
        limit, elapsed = train.max_wallclock_seconds, self._clock.seconds()
        frac = step / train.steps if limit is None else elapsed / limit
        self._phase = next_phase(
            self._phase,
            frac,
            config.model.num_loops,
            train.enable_looping_at,
            train.loop_phase2_at,
        )
        weight = jepa_weight(frac, jepa.lambda_, jepa.start_frac, jepa.ramp_frac)
        last = step == train.steps - 1 or (limit is not None and elapsed >= limit)
        stop = last or self._stop_requested or step + 1 == train.stop_at
        every = config.eval.every
        evaluate = last or (every > 0 and (step + 1) % every == 0)
        return StepPlan(
            step=step,
            frac=frac,
            lr_multiplier=lr_multiplier(frac, optim.warmdown_frac, optim.min_lr),
            muon_momentum=muon_momentum(
                step,
                optim.muon_momentum_warmup_start,
                optim.muon_momentum,
                optim.muon_momentum_warmup_steps,
            ),
            phase=self._phase,
            jepa_weight=weight,
            log=evaluate or stop or (step + 1) % train.log_every == 0,
            evaluate=evaluate,
            last=last,
            save=stop or self._is_time_to_save(step),
            stop=stop,
            spans=self._sample_jepa_spans(step) if weight > 0 else None,
        )

    def _is_time_to_save(self, step: int) -> bool:
        config = self._config.checkpoint
        seconds = time.monotonic() - self._saved_at
        by_time = config.minutes > 0 and seconds >= 60 * config.minutes
        if by_time:
            self._saved_at = time.monotonic()
        return by_time or (config.every > 0 and (step + 1) % config.every == 0)

    def _sample_jepa_spans(self, step: int) -> Spans:
        config = self._config
        return sample_spans(
            config.seed,
            step,
            (config.batch.sequences, config.jepa.spans_per_sequence),
            config.model.seq_len,
            config.jepa.max_span_frac,
            config.jepa.sampler,
        )


class PlanChannel:
    """Brings rank 0's plans to every rank, one step ahead of their use."""

    def __init__(self, config: Config, world: World, clock: TrainingClock, phase: int = 0) -> None:
        self._world = world
        self._span_shape = (config.batch.sequences, config.jepa.spans_per_sequence, 2)
        self._planner = Planner(config, clock, phase) if world.is_main else None
        self._buffer = torch.empty(0)
        self._pending: dist.Work | None = None

    def request_stop(self) -> None:
        """Ask for a stop; heard on rank 0, which learns of every rank's request."""
        if self._planner is not None:
            self._planner.request_stop()

    def request(self, step: int) -> None:
        """Start the broadcast of the plan of ``step``; returns at once."""
        if self._planner is not None:
            self._buffer = self._planner.plan(step).pack(self._span_shape)
        else:
            size = len(_HEADER) + int(np.prod(self._span_shape))
            self._buffer = torch.empty(size, dtype=torch.float64)
        if self._world.world_size > 1:
            self._pending = dist.broadcast(
                self._buffer, src=0, group=self._world.control, async_op=True
            )

    def take(self) -> StepPlan:
        """The plan asked for last; waits only if it has not arrived yet."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return StepPlan.unpack(self._buffer, self._span_shape)
