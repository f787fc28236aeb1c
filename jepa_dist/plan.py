"""The plan of a step: decided by rank 0 alone, broadcast to all ranks once (one plan per step).

Distributed jobs hang when ranks decide on their own, so only the ``Planner`` on rank 0 draws
samples and decides whether to evaluate. Each plan is broadcast one step ahead, on a CPU group: when
a step begins, its plan has arrived.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.data.boundaries import DocumentStarts
from jepa_dist.objectives.objective import Sampler, Samples
from jepa_dist.objectives.registry import objective_class
from jepa_dist.optim.schedule import jepa_weight, muon_momentum, next_phase, rate_multiplier
from jepa_dist.parallel.world import World

Shape: TypeAlias = tuple[int, ...] | None
"""Shape of the samples of a global batch; None if the objective samples nothing."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    step: int
    frac: float
    """Fraction of the run that is over when the step begins."""
    lr_multiplier: float
    muon_momentum: float
    phase: int
    """Recurrence phase of the model."""
    jepa_weight: float
    """Lambda of this step; 0 switches the objective off: no samples, no JEPA region."""
    log: bool
    probe: bool
    """The objective's diagnostics are measured in this step, and logged."""
    evaluate: bool
    last: bool
    """The run is complete after this step."""
    save: bool
    """A checkpoint follows this step."""
    finalize_save: bool
    """Rank 0 saw the pending save complete; every rank finalizes it at this step."""
    stop: bool
    """Training stops after this step: it is the last one, or a stop was requested."""
    roll_back: bool
    """The run rolls back to its last healthy checkpoint after this step."""
    samples: Samples | None
    """The objective's samples of the global batch, int64 [rows, ...] (``Objective.sampler``);
    None while it is off, or if it samples nothing."""

    @classmethod
    def for_warm_up(cls, phase: int, jepa_weight: float, samples: Samples | None) -> StepPlan:
        """Return the plan of a step that is compiled but never taken."""
        return cls(
            step=-1,
            frac=0.0,
            lr_multiplier=0.0,
            muon_momentum=0.0,
            phase=phase,
            jepa_weight=jepa_weight,
            log=False,
            probe=False,
            evaluate=False,
            last=False,
            save=False,
            finalize_save=False,
            stop=False,
            roll_back=False,
            samples=samples,
        )

    @property
    def is_objective_on(self) -> bool:
        """Whether the objective is part of this step's loss."""
        return self.jepa_weight > 0

    @property
    def is_followed(self) -> bool:
        """Whether the next step comes right after this one."""
        return not (self.stop or self.roll_back)

    def pack(self, shape: Shape) -> Tensor:
        """Return one float64 tensor of fixed size (all integers are far below 2**53)."""
        samples = np.zeros(shape or 0) if self.samples is None else self.samples
        header = [float(getattr(self, name)) for name in _HEADER]
        return torch.from_numpy(np.concatenate([header, samples.ravel()]))

    @classmethod
    def unpack(cls, packed: Tensor, shape: Shape) -> StepPlan:
        """Return the plan that ``pack`` has packed."""
        values = packed.numpy()
        header = dict(zip(_HEADER, values[: len(_HEADER)].tolist(), strict=True))
        typed = {name: _HEADER[name](value) for name, value in header.items()}
        if shape is None or header["jepa_weight"] == 0:
            return cls(**typed, samples=None)
        return cls(**typed, samples=values[len(_HEADER) :].astype(np.int64).reshape(shape))


_TYPES: dict[Any, type] = {"int": int, "float": float, "bool": bool}
_HEADER = {field.name: _TYPES[field.type] for field in fields(StepPlan) if field.name != "samples"}


class TrainingClock:
    """Clock of training time; stopped while paused (evaluation)."""

    def __init__(self) -> None:
        self.start()

    def start(self, seconds: float = 0.0) -> None:
        """Start at ``seconds``, the training time of the run's earlier starts."""
        self._started = time.monotonic() - seconds

    def seconds(self) -> float:
        """Return the training time so far."""
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside this context."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began


class SamplesAhead:
    """Samples of a step, drawn in a thread while the previous step runs."""

    def __init__(self, sample: Sampler) -> None:
        self._sample = sample
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._begun: dict[int, Future[Samples]] = {}

    def __call__(self, step: int) -> Samples:
        """Return the samples of ``step`` and start drawing those of the next step."""
        begun = self._begun.pop(step, None)
        samples = self._sample(step) if begun is None else begun.result()
        self._begun = {step + 1: self._thread.submit(self._sample, step + 1)}
        return samples


class Planner:
    """Rank 0's decisions. A checkpoint keeps only the recurrence phase of its state.

    ``documents`` is given if the objective's samples depend on document starts.
    """

    def __init__(
        self,
        config: Config,
        clock: TrainingClock,
        phase: int = 0,
        documents: DocumentStarts | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._phase = phase
        self._sampler = _sampler(config, documents)
        self._saved_at = time.monotonic()
        self.stop_reason: str | None = None
        """Why to stop training; the next step that is planned becomes the last one."""
        self.roll_back = False
        """Whether to roll back after the next step that is planned."""

    def plan(self, step: int, finalize_save: bool = False) -> StepPlan:
        """Return the plan of ``step``; call it for consecutive steps.

        Args:
            step: Optimizer step.
            finalize_save: The pending save has completed on this rank.
        """
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
        weight = jepa_weight(frac, jepa.lambda_, jepa.start_frac, jepa.ramp_frac, jepa.stop_frac)
        last = step == train.steps - 1 or (limit is not None and elapsed >= limit)
        last = last and not self.roll_back
        if step + 1 == train.stop_at:
            self.stop_reason = f"train.stop_at={train.stop_at}"
        stop = last or (self.stop_reason is not None and not self.roll_back)
        probe = weight > 0 and _is_due(step, config.monitor.jepa_every)
        evaluate = last or (_is_due(step, config.eval.every) and not self.roll_back)
        return StepPlan(
            step=step,
            frac=frac,
            lr_multiplier=rate_multiplier(frac, config.schedule, optim),
            muon_momentum=muon_momentum(
                step,
                optim.muon_momentum_warmup_start,
                optim.muon_momentum,
                optim.muon_momentum_warmup_steps,
            ),
            phase=self._phase,
            jepa_weight=weight,
            log=evaluate or probe or stop or self.roll_back or _is_due(step, train.log_every),
            probe=probe,
            evaluate=evaluate,
            last=last,
            save=not self.roll_back and (stop or self._is_time_to_save(step)),
            finalize_save=finalize_save,
            stop=stop,
            roll_back=self.roll_back,
            samples=self._sampler(step) if weight > 0 and self._sampler is not None else None,
        )

    def _is_time_to_save(self, step: int) -> bool:
        config = self._config.checkpoint
        seconds = time.monotonic() - self._saved_at
        by_time = config.minutes > 0 and seconds >= 60 * config.minutes
        if by_time:
            self._saved_at = time.monotonic()
        return by_time or _is_due(step, config.every)


def sample_shape(config: Config) -> Shape:
    """Return the shape of the objective's samples of the global batch."""
    shape = objective_class(config).sample_shape(config)
    return None if shape is None else (config.batch.sequences, *shape)


def _sampler(config: Config, documents: DocumentStarts | None) -> Sampler | None:
    """Return the function that draws the objective's samples; None if it has none."""
    objective = objective_class(config)
    if objective.sample_shape(config) is None:
        return None
    if documents is None:
        return objective.sampler(config, None)
    # Reading every row of the global batch takes long enough to be done ahead of time.
    return SamplesAhead(objective.sampler(config, documents.read))


def _is_due(step: int, every: int) -> bool:
    """Return whether something done every ``every`` steps (0: never) is due in this step."""
    return every > 0 and (step + 1) % every == 0


class PlanChannel:
    """Broadcast of rank 0's plans to every rank, one step ahead of their use."""

    def __init__(
        self,
        config: Config,
        world: World,
        clock: TrainingClock,
        phase: int = 0,
        documents: DocumentStarts | None = None,
    ) -> None:
        self._world = world
        self._shape = sample_shape(config)
        self._planner = Planner(config, clock, phase, documents) if world.is_main else None
        self._buffer = torch.empty(0)
        self._pending: dist.Work | None = None

    def request_stop(self, reason: str) -> None:
        """Request a stop. Has an effect on rank 0 only, which learns of every rank's request."""
        if self._planner is not None and self._planner.stop_reason is None:
            self._planner.stop_reason = reason

    def request_roll_back(self) -> None:
        """Request a roll-back to the last healthy checkpoint. Has an effect on rank 0 only."""
        if self._planner is not None:
            self._planner.roll_back = True

    @property
    def stop_reason(self) -> str | None:
        """Why training stops early, on rank 0; None otherwise."""
        return None if self._planner is None else self._planner.stop_reason

    def request(self, step: int, finalize_save: bool = False) -> None:
        """Start the broadcast of the plan of ``step``; return immediately."""
        if self._planner is not None:
            self._buffer = self._planner.plan(step, finalize_save).pack(self._shape)
        else:
            size = len(_HEADER) + int(np.prod(self._shape or 0))
            self._buffer = torch.empty(size, dtype=torch.float64)
        if self._world.world_size > 1:
            self._pending = dist.broadcast(
                self._buffer, src=0, group=self._world.control, async_op=True
            )

    def take(self) -> StepPlan:
        """Return the plan requested last; wait only if it has not arrived yet."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return StepPlan.unpack(self._buffer, self._shape)
