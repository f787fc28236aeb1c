"""Training runs to be measured: the trainer's own loop, paused after each round of steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_dist.bench.common import synchronize
from jepa_dist.config import Config
from jepa_dist.monitor.writer import MetricsWriter
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.training.listeners import Silent
from jepa_dist.training.loop import Trainer
from jepa_dist.training.step import Loss


def steady(config: Config, rounds: int, steps: int) -> Config:
    """Return the configuration for ``rounds`` rounds of ``steps`` uniform steps.

    A record after every round; no evaluation or objective diagnostics; schedules stay at their
    start (with ``train.enable_looping_at=0``, blocks loop from the first step).
    """
    train = config.train.model_copy(
        update={
            "steps": 1_000_000_000,
            "stop_at": rounds * steps,
            "log_every": steps,
            "max_wallclock_seconds": None,
        }
    )
    return config.model_copy(
        update={
            "train": train,
            "eval": config.eval.model_copy(update={"every": 0}),
            "monitor": config.monitor.model_copy(update={"jepa_every": 0}),
        }
    )


def with_objective(config: Config, start_frac: float) -> Config:
    """Return a configuration with an objective: from the first step on (0), or in none (1)."""
    weight = config.jepa.lambda_ or 0.02
    changes = {"start_frac": start_frac, "ramp_frac": 0.0, "lambda_": weight}
    changes["within_documents"] = False  # random data have no documents
    return config.model_copy(update={"jepa": config.jepa.model_copy(update=changes)})


def stepper(
    trainer: Trainer, config: Config | None = None, loss: Loss | None = None
) -> Callable[[], None]:
    """Return a function that plans and runs the trainer's next step; call it on every rank.

    Args:
        trainer: Its state is trained, on its data.
        config: Configuration of the planner; default the trainer's.
        loss: Loss to train on; default the trainer's.
    """
    planner = Planner(config or trainer.config, TrainingClock())
    train_step = replace(trainer.train_step, loss=loss or trainer.train_step.loss)
    steps = itertools.count()

    def step() -> None:
        train_step(planner.plan(next(steps)), trainer.segment)
        trainer.segment.reduction.arrived()

    return step


class Rounds(Silent):
    """A publisher that times the rounds of a run, and those of a rival (another loop) in between.

    All of the trainer's work is measured, including the writing of records; the rival's time does
    not count as training. On rank 0 only; the ``first`` rounds are warm-up and are dropped.
    """

    def __init__(
        self, trainer: Trainer, rival: Callable[[], object] = lambda: None, first: int = 1
    ) -> None:
        self._trainer = trainer
        self._rival = rival
        self._first = first
        self._device = trainer.state.world.device
        self._writer = MetricsWriter(Path(trainer.config.run.dir))
        self._began = time.perf_counter()
        self._trainer_seconds: list[float] = []
        self._rival_seconds: list[float] = []
        self._records: list[Mapping[str, Any]] = []

    @property
    def trainer_seconds(self) -> list[float]:
        """The trainer's seconds per step, by round."""
        return self._trainer_seconds[self._first :]

    @property
    def rival_seconds(self) -> list[float]:
        """The rival's seconds per call, by round; it is called once per step."""
        return self._rival_seconds[self._first :]

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The trainer's record of each round."""
        return self._records[self._first :]

    def step(self, record: Mapping[str, Any] | None) -> None:
        """Count a completed step; a record completes a round."""
        if record is None:
            return
        self._writer.write(record)
        steps = self._trainer.config.train.log_every
        synchronize(self._device)
        self._trainer_seconds.append((time.perf_counter() - self._began) / steps)
        self._records.append(record)
        with self._trainer.times.off_training("rival"):
            began = time.perf_counter()
            for _ in range(steps):
                self._rival()
            synchronize(self._device)
            self._rival_seconds.append((time.perf_counter() - began) / steps)
        self._began = time.perf_counter()

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


def train_in_rounds(trainer: Trainer, rival: Callable[[], object] = lambda: None) -> Rounds | None:
    """Train to the end of a ``steady`` configuration. Collective.

    Args:
        trainer: Trainer with a ``steady`` configuration.
        rival: Called on rank 0, after every round as often as the round has steps.

    Returns:
        The rounds on rank 0, None on others.
    """
    if not trainer.state.world.is_main:
        trainer.run()
        return None
    rounds = Rounds(trainer, rival)
    trainer.run(rounds)
    rounds.close()
    return rounds
