"""A stretch of a run that begins at one state: at the start, at a checkpoint, or at a roll-back.

Everything that depends on the run's progress is here, so that a roll-back replaces one object. What
it does not replace (the tensors, the clocks, the instruments) is in ``state``, ``times`` and
``instruments``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.data.loader import Batch
from jepa_dist.data.mixture import Mixture
from jepa_dist.data.order import places_of
from jepa_dist.data.sources import mixture_metrics, source_losses
from jepa_dist.monitor.step_timer import RollingDigest
from jepa_dist.parallel.reduce import MetricsReduction, StepReport
from jepa_dist.plan import PlanChannel, StepPlan, TrainingClock
from jepa_dist.run.progress import Progress
from jepa_dist.training.health import BadSteps
from jepa_dist.training.stopping import stop_reason


class Batches(Iterator[Batch], Protocol):
    """This rank's micro-batches, in order."""

    @property
    def samples_consumed(self) -> int:
        """Sequences of the global order that all ranks together have taken so far."""

    def close(self) -> None:
        """Stop the prefetching processes."""


class Observer(Protocol):
    """Receiver of every step's report, in order (``instruments.Instrument``)."""

    def observe(self, report: StepReport) -> None:
        """Process the numbers of a step."""


class Ledger:
    """Totals over the steps of a segment, and the latest step's numbers."""

    def __init__(self, progress: Progress) -> None:
        self.bad_steps = BadSteps(progress)
        self.tokens_digest = RollingDigest(progress.tokens_digest)
        self.spans_digest = RollingDigest(progress.spans_digest)
        self.values: Mapping[str, float] = {}
        """Of the latest report."""

    def observe(self, report: StepReport, first_sample: int) -> None:
        """Account for a step; ``first_sample`` is the run's samples consumed before it."""
        self.values = report.values
        self.tokens_digest.update(report.digest.to_bytes(8, "little"))
        self.bad_steps.observe(report, first_sample)

    def digests(self) -> dict[str, str]:
        """Return the digests of all data and spans so far, as a record has them."""
        return {
            "tokens_digest": self.tokens_digest.hex(),
            "spans_digest": self.spans_digest.hex(),
        }


@dataclass(frozen=True)
class Segment:
    """The run from ``progress`` on. A resume or a roll-back makes a new one."""

    config: Config
    progress: Progress
    """How far the run was when the segment began."""
    batches: Batches
    order: Mixture
    """Of the samples in the batches."""
    plans: PlanChannel
    reduction: MetricsReduction
    ledger: Ledger
    observer: Observer
    """Receives the same reports as the ledger."""

    def start(self, clock: TrainingClock) -> None:
        """Start the training clock and request the first plan. Call on every rank."""
        clock.start(self.progress.seconds)
        self.plans.request(self.progress.step)

    def submit(
        self,
        plan: StepPlan,
        sums: Mapping[str, Tensor],
        host_sums: Mapping[str, float],
        digest: int,
        grad_norm: Tensor,
    ) -> None:
        """Start the reduction of a step's numbers over the ranks; see ``MetricsReduction``."""
        if plan.samples is not None:
            self.ledger.spans_digest.update(plan.samples.astype("<i8").tobytes())
        self.reduction.submit(plan.step, sums, host_sums, digest, {"grad_norm": grad_norm})

    def process_arrived(self) -> None:
        """Account for the steps whose numbers are on the host; does not wait."""
        self._process(self.reduction.arrived())

    def drain(self) -> None:
        """Account for all steps so far; waits for the device."""
        self._process(self.reduction.drain())

    def _process(self, reports: list[StepReport]) -> None:
        for report in reports:
            self.ledger.observe(report, self._samples_before(report.step))
            self.observer.observe(report)
            if reason := stop_reason(report.values):
                self.plans.request_stop(reason)
        if self.ledger.bad_steps.consecutive >= self.config.train.max_bad_steps:
            self.plans.request_roll_back()

    def _samples_before(self, step: int) -> int:
        """Return the sequences that the run has consumed before a step of this segment."""
        steps = step - self.progress.step
        return self.progress.samples_consumed + steps * self.config.batch.sequences

    def tokens_after(self, plan: StepPlan) -> int:
        """Return the tokens that the run has trained on once ``plan`` is done."""
        return self._samples_before(plan.step + 1) * self.config.model.seq_len

    def mixture(self, plan: StepPlan) -> dict[str, float | None]:
        """Return the metrics of a mixture in the step of ``plan``, the latest one whose numbers
        have arrived; empty without a mixture."""
        first, sequences = self._samples_before(plan.step), self.config.batch.sequences
        places = places_of(first, sequences, self.progress.skip)
        ends = int(places[0]), int(places[-1]) + 1
        return {
            **source_losses(self.config, self.order, places, self.ledger.values),
            **mixture_metrics(self.config, self.order, *ends),
        }

    def progress_after(self, plan: StepPlan, clock: TrainingClock) -> Progress:
        """Return how far the run is once ``plan`` is done; waits for the device."""
        self.drain()
        bad_steps = self.ledger.bad_steps
        return replace(
            self.progress,
            step=plan.step + 1,
            samples_consumed=self.batches.samples_consumed,
            phase=plan.phase,
            seconds=clock.seconds(),
            bad_steps=bad_steps.total,
            bad_in_row=bad_steps.consecutive,
            bad_row_sample=bad_steps.row_sample,
            tokens_digest=self.ledger.tokens_digest.hex(),
            spans_digest=self.ledger.spans_digest.hex(),
        )

    @property
    def is_complete(self) -> bool:
        """Whether no step is left: an earlier start ended before it could conclude the run."""
        train = self.config.train
        limit = train.max_wallclock_seconds
        return self.progress.step >= train.steps or (
            limit is not None and self.progress.seconds >= limit
        )
