"""Roll-back after repeated bad steps, and refusal to finish with them."""

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
    """Roll-back to the last healthy checkpoint, at most once in a run.

    Args:
        state: Its tensors are restored.
        saving: Its checkpoints.
        times: The training clock is set back, too.
        open_segment: Builds the segment that starts from a given progress.
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
        """Return the segment that replaces ``segment``: from the last healthy checkpoint,
        skipping the data of the bad steps. Collective.

        The state is saved again immediately, so that a restart skips those data, too.

        Raises:
            TrainingError: on every rank: it was rolled back before, or there is no such checkpoint.
        """
        segment.drain()
        bad_steps = segment.ledger.bad_steps
        window = range(bad_steps.row_sample, segment.batches.samples_consumed)
        problem = f"loss or gradient was not finite for {bad_steps.consecutive} steps in a row"
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
            f"{window.stop - 1} of the order will be skipped",
        )
        following.start(self._times.clock)
        return following


def refuse_bad_end(plan: StepPlan, segment: Segment, validation: Mapping[str, Any]) -> None:
    """Raise if the run ended with numbers that are not finite.

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
    consecutive = segment.ledger.bad_steps.consecutive
    if consecutive > 0:
        raise TrainingError(
            f"the last {consecutive} step(s) of the run were skipped, because loss or gradient was "
            "not finite: the run is not finished",
            advice,
        )
    bad = [key for key in ("val/loss", "val/ema_loss") if not _is_finite(validation.get(key))]
    if bad:
        raise TrainingError(f"{', '.join(bad)}: not finite at the end of the run", advice)


def _is_finite(value: float | None) -> bool:
    """Return whether a number is finite or None."""
    return value is None or math.isfinite(value)


def _advice(problem: str, window: range, why_not: str) -> tuple[str, ...]:
    """Return the lines of the error with which the run ends."""
    return (
        f"{problem}, and {why_not}",
        f"the data they came with: samples {window.start} to {window.stop - 1} of the run's order",
        "lower the learning rates (optim.*_lr) or optim.grad_clip_norm, check the data, or resume "
        "from an earlier checkpoint in another run.dir (checkpoint.resume=PATH)",
    )
