"""The training loop: what a run does in which order, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jepa_dist.config import Config
from jepa_dist.plan import StepPlan
from jepa_dist.process.garbage import ScheduledCollection
from jepa_dist.training.evaluation import Evaluation
from jepa_dist.training.instruments import Instruments
from jepa_dist.training.listeners import NO_PROFILER, SILENT, Profiler, Publisher
from jepa_dist.training.records import compiled_graphs, losses
from jepa_dist.training.recovery import Recovery, refuse_bad_end
from jepa_dist.training.saving import Saving
from jepa_dist.training.segment import Segment
from jepa_dist.training.state import TrainState
from jepa_dist.training.step import TrainStep
from jepa_dist.training.times import Times
from jepa_dist.training.warm_up import NoWarmUp, WarmUp


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    step: int
    """Optimizer steps done."""
    phase: int
    """Recurrence phase of the last step."""
    finished: bool
    """Whether the run is complete; if not, it was asked to stop, and another start continues it."""
    saved: bool
    """Whether a checkpoint holds the last step."""
    reason: str
    """Why it ended, for the user; on rank 0 only, unless it finished."""
    metrics: Mapping[str, Any]
    """The last record, with totals; empty if no step was taken."""

    def summary(self) -> dict[str, Any]:
        """Return the closing record of ``metrics.jsonl``."""
        return {
            "step": self.step,
            **self.metrics,
            "finished": self.finished,
            "saved": self.saved,
            "reason": self.reason,
        }


class Trainer:
    """The training loop of one rank; built by ``assemble.build_trainer``.

    Args:
        config: The run.
        state: What is trained.
        segment: The segment that it begins with.
        times: The clocks.
        train_step: One optimizer step.
        instruments: Measurements of the step.
        evaluation: Validation, and a sample.
        saving: Checkpoints.
        recovery: The roll-back after bad steps.
        warm_up: Compilation before the first step.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        segment: Segment,
        times: Times,
        train_step: TrainStep,
        instruments: Instruments,
        evaluation: Evaluation,
        saving: Saving,
        recovery: Recovery,
        warm_up: WarmUp | NoWarmUp,
    ) -> None:
        self.config = config
        self.state = state
        self.segment = segment
        self.times = times
        self.train_step = train_step
        self.instruments = instruments
        self.evaluation = evaluation
        self.saving = saving
        self.recovery = recovery
        self.warm_up = warm_up

    def run(self, publisher: Publisher = SILENT, profiler: Profiler = NO_PROFILER) -> Outcome:
        """Train until the last step, or until a stop is requested. Collective.

        Raises:
            TrainingError: on every rank: the loss does not stay finite.
        """
        garbage = ScheduledCollection(self.config.train.gc_every)
        try:
            if self.segment.is_complete:
                return self._conclude()
            if not self.warm_up.run(publisher.say):
                return self._stopped_before_training()
            self.times.meter.start()
            self.segment.start(self.times.clock)
            while True:
                plan = self._next_plan(profiler)
                self.step(plan)
                self._process_arrived(plan)
                validation = self.evaluation.run(plan, self.segment.plans)
                self.instruments.compiles.after_step(plan)
                garbage.after_step(plan.step, compiled_graphs())
                self.saving.finalize(plan)
                record = self._publish(plan, validation, publisher)
                # After the record: a start that resumes from this checkpoint does not write it.
                self.saving.save_after(plan, self.segment)
                if plan.roll_back:
                    self.segment = self.recovery.roll_back(self.segment, publisher)
                if plan.stop:
                    return self._outcome(plan, plan.step + 1, record, validation)
        finally:
            garbage.close()
            self.segment.batches.close()

    def step(self, plan: StepPlan) -> None:
        """Take one optimizer step; its numbers arrive later, in ``segment``. Collective."""
        self.train_step(plan, self.segment)

    def _next_plan(self, profiler: Profiler) -> StepPlan:
        """Return the plan of the next step; start the broadcast of the plan after it."""
        plan = self.segment.plans.take()
        profiler.step()  # while no broadcast is in flight: see StepProfiler.step
        if plan.is_followed:
            self.segment.plans.request(plan.step + 1, finalize_save=self.saving.is_completed)
        return plan

    def _process_arrived(self, plan: StepPlan) -> None:
        """Account for the steps whose numbers have arrived, ``plan``'s or earlier ones."""
        self.segment.process_arrived()
        if plan.step == self.segment.progress.step:
            self.times.startup.done("first_step")

    def _publish(
        self, plan: StepPlan, validation: Mapping[str, Any], publisher: Publisher
    ) -> dict[str, Any]:
        """Publish the step's record; return it, or an empty one if the step is not logged."""
        record = {**self._record(plan), **validation} if plan.log else {}
        publisher.step(record or None)
        self.instruments.histograms.publish(publisher, plan.step + 1)
        return record

    def _record(self, plan: StepPlan) -> dict[str, Any]:
        """Return the record of a logged step; waits for the device."""
        self.segment.drain()
        values = self.segment.ledger.values
        return {
            "step": plan.step + 1,
            "tokens": self.segment.tokens_after(plan),
            **losses(plan, values, self.state.objective),
            "grad_norm": values["grad_norm"],
            "progress": plan.frac,
            **self.segment.mixture(plan),
            "phase": plan.phase,
            **{f"lr/{name}": lr for name, lr in self.state.optimizer.learning_rates().items()},
            **self.instruments.record(plan, values),
            "bad_steps": self.segment.ledger.bad_steps.total,
            **self.saving.costs(),
            **self.times.startup.record(),
            "train_seconds": self.times.clock.seconds(),
            **self.segment.ledger.digests(),
        }

    # ---------------------------------------------------------------- the end

    def _conclude(self) -> Outcome:
        """Do what follows the last step: validation and the closing record."""
        progress = self.segment.progress
        nothing = StepPlan.for_warm_up(progress.phase, 0.0, None)
        plan = replace(nothing, last=True, evaluate=True)
        validation = self.evaluation.run(plan, self.segment.plans)
        record = {
            "step": progress.step,
            "phase": progress.phase,
            **validation,
            **self.segment.ledger.digests(),
        }
        return self._outcome(plan, progress.step, record, validation)

    def _outcome(
        self, plan: StepPlan, step: int, record: Mapping[str, Any], validation: Mapping[str, Any]
    ) -> Outcome:
        """Return how training ended; not finished if the last validation was interrupted.

        Raises:
            TrainingError: the run would finish with numbers that are not finite.
        """
        refuse_bad_end(plan, self.segment, validation)
        finished = plan.last and bool(validation)
        if not finished:
            reason = self.segment.plans.stop_reason or ""
        elif step < self.config.train.steps:
            reason = "the time is used up (train.max_wallclock_seconds)"
        else:
            reason = "all steps are done"
        metrics = {**record, **self.times.meter.summary()}
        return Outcome(step, plan.phase, finished, self.saving.is_on, reason, metrics)

    def _stopped_before_training(self) -> Outcome:
        progress = self.segment.progress
        return Outcome(
            progress.step,
            progress.phase,
            finished=False,
            saved=progress.step > 0,
            reason="asked to stop before the first step",
            metrics={},
        )

    def export(self, folder: Path, outcome: Outcome) -> None:
        """Write the trained model, and its EMA if there is one, as safetensors. Collective."""
        self.state.export(folder, self.config, outcome.step, outcome.phase)
