"""What a run does about losses and gradients that do not become finite again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jepa_dist.errors import TrainingError
from jepa_dist.plan import StepPlan
from jepa_dist.run.progress import Progress
from jepa_dist.training.listeners import Publisher
from jepa_dist.training.saving import Saving
from jepa_dist.training.segment import Segment
from jepa_dist.training.state import TrainState
from jepa_dist.training.times import Times


class Recovery:
    """Rolls back to the last healthy checkpoint, once in a run.

    Args:
        state: Its tensors are restored.
        saving: Knows the checkpoints.
        times: The training clock goes back, too.
        open_segment: Builds the segment that follows from a progress.
    """

    def __init__(
        self,
        state: TrainState,
        saving: Saving,
        times: Times,
        open_segment: Callable[[Progress], Segment],
    ) -> None:
        self._state = state
        self._saving = saving
        self._times = times
        self._open_segment = open_segment

    def roll_back(self, segment: Segment, publisher: Publisher) -> Segment:
        """Return the segment that replaces ``segment``: from the last healthy checkpoint on,
        without the data that came with the bad steps. Collective.

        The state is saved again at once, so that a restart leaves those data out, too.

        Raises:
            TrainingError: on every rank: it has been done before, or there is no such checkpoint.
        """
        segment.drain()
        bad_steps = segment.ledger.bad_steps
        window = range(bad_steps.row_sample, segment.batches.samples_consumed)
        problem = f"loss or gradient was not finite for {bad_steps.in_row} steps in a row"
        if segment.progress.skip_count:
            raise TrainingError(*_advice(problem, window, "it was rolled back once already"))
        checkpoint = self._saving.last_healthy()
        if checkpoint is None:
            raise TrainingError(*_advice(problem, window, "there is no healthy checkpoint"))
        restored = self._state.restore(checkpoint)
        self._saving.set_aside_after(restored.step)
        segment.batches.close()
        progress = replace(
            restored,
            skip_start=window.start,
            skip_count=len(window),
            bad_steps=bad_steps.total,
            bad_in_row=0,
        )
        following = self._open_segment(progress)
        self._saving.save(progress, wait=True)
        publisher.go_back(
            progress.step,
            f"{problem}: going back to step {progress.step}; samples {window.start} to "
            f"{window.stop - 1} of the order will be passed over",
        )
        following.start(self._times.clock)
        return following


def refuse_bad_end(plan: StepPlan, segment: Segment, validation: Mapping[str, Any]) -> None:
    """Do not let a run count as finished that ended in numbers that are not finite.

    Raises:
        TrainingError: on every rank: its last steps were skipped, or its validation loss (live or
            averaged) is not finite.
    """
    if not plan.last:
        return
    advice = (
        "nothing was exported (python -m jepa_dist.checkpoint export RUN OUT --not-finite exports "
        "it anyway); resume from an earlier checkpoint in another run.dir "
        "(checkpoint.resume=PATH) with lower learning rates (optim.*_lr)"
    )
    in_row = segment.ledger.bad_steps.in_row
    if in_row > 0:
        raise TrainingError(
            f"the last {in_row} step(s) of the run were skipped, because loss or gradient was "
            "not finite: the run is not finished",
            advice,
        )
    bad = [key for key in ("val/loss", "val/ema_loss") if not _is_finite(validation.get(key))]
    if bad:
        raise TrainingError(f"{', '.join(bad)}: not finite at the end of the run", advice)


def _is_finite(value: float | None) -> bool:
    """Return whether a number, if there is one, is finite."""
    return value is None or math.isfinite(value)


def _advice(problem: str, window: range, why_not: str) -> tuple[str, ...]:
    """Return the lines that the user reads when the run gives up."""
    return (
        f"{problem}, and {why_not}",
        f"the data they came with: samples {window.start} to {window.stop - 1} of the run's order",
        "lower the learning rates (optim.*_lr) or optim.grad_clip_norm, check the data, or resume "
        "from an earlier checkpoint in another run.dir (checkpoint.resume=PATH)",
    )
