"""Checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jepa_dist.checkpoint import Checkpointer, find_resumable, set_aside_after
from jepa_dist.plan import StepPlan
from jepa_dist.run.progress import Progress
from jepa_dist.training.segment import Segment
from jepa_dist.training.state import TrainState
from jepa_dist.training.times import Times


class Saving:
    """The saving of a run without checkpoints: does nothing."""

    is_on = False

    @property
    def in_flight(self) -> bool:
        """Whether this rank is writing a save."""
        return False

    @property
    def is_completed(self) -> bool:
        """Whether a save has completed but is not finalized yet."""
        return False

    def finalize(self, plan: StepPlan) -> None:
        """Finalize the pending save if the plan says so."""

    def save_after(self, plan: StepPlan, segment: Segment) -> None:
        """Start a checkpoint if the plan says so. Collective."""

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Start a checkpoint; ``wait`` until it is published. Collective."""

    def last_healthy(self) -> Path | None:
        """Return the newest checkpoint whose earlier losses were finite. Collective."""
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, so that no start resumes from them. Collective."""

    def costs(self) -> dict[str, float]:
        """Return the costs of the saves finalized since the last call, as metrics."""
        return {}


class CheckpointSaving(Saving):
    """Saving of a state's tensors and the run's progress.

    Args:
        checkpointer: Writes the files.
        state: Owner of the tensors.
        times: A save does not count as training time.
        identity: What a checkpoint stores of the run besides (configuration, data fingerprint).
    """

    is_on = True

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: TrainState,
        times: Times,
        identity: Mapping[str, Any],
    ) -> None:
        self._checkpointer = checkpointer
        self._state = state
        self._times = times
        self._identity = identity

    @property
    def in_flight(self) -> bool:
        """Whether this rank is writing a save."""
        return self._checkpointer.in_flight

    @property
    def is_completed(self) -> bool:
        """Whether a save has completed but is not finalized yet."""
        return self._checkpointer.save_completed

    def finalize(self, plan: StepPlan) -> None:
        """Finalize the pending save if the plan says so."""
        if plan.finalize_save:
            self._checkpointer.wait()

    def save_after(self, plan: StepPlan, segment: Segment) -> None:
        """Start a checkpoint if the plan says so; wait for it if the run stops. Collective."""
        if plan.save:
            progress = segment.progress_after(plan, self._times.clock)
            self.save(progress, wait=plan.stop)

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Start a checkpoint; ``wait`` until it is published. Collective."""
        is_healthy = progress.bad_in_row == 0
        state = {**asdict(progress), **self._identity, "healthy": is_healthy}
        with self._times.off_training("checkpoint"):
            self._checkpointer.save(progress.step, self._state.tensors(), state, wait=wait)

    def last_healthy(self) -> Path | None:
        """Return the newest checkpoint whose earlier losses were finite. Collective.

        Waits for the pending save.
        """
        self._checkpointer.wait()
        folder = self._checkpointer.folder
        return find_resumable(folder, self._state.world, only_healthy=True).path

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, so that no start resumes from them. Collective."""
        folder = self._checkpointer.folder

        def rename() -> None:
            set_aside_after(folder, step)

        self._state.world.run_on_main(rename)

    def costs(self) -> dict[str, float]:
        """Return the costs of the saves finalized since the last call, as metrics."""
        reports = self._checkpointer.poll()
        if not reports:
            return {}
        first = [report.stall_seconds for report in reports if report.is_first]
        later = [report.stall_seconds for report in reports if not report.is_first]
        return {
            **({"checkpoint/first_stall_seconds": first[0]} if first else {}),
            **({"checkpoint/stall_seconds": max(later)} if later else {}),
            "checkpoint/background_seconds": max(report.background_seconds for report in reports),
            "checkpoint/bytes": float(reports[-1].bytes),
        }
