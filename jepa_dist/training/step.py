"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch
from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.plan import StepPlan
from jepa_dist.training.instruments import Instruments
from jepa_dist.training.segment import Segment
from jepa_dist.training.state import TrainState

Sums: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Batch, StepPlan, int], tuple[Tensor, Sums]]


@dataclass(frozen=True)
class TrainStep:
    """Accumulate the gradient of the global batch, clip it, update the weights.

    A step whose loss or gradient is not finite updates nothing, on any rank; the host finds out
    when the step's report arrives.
    """

    state: TrainState
    layout: BatchLayout
    loss: Loss
    """Computes a micro-batch's share of the global loss, and its parts (``GlobalLoss``)."""
    instruments: Instruments
    meter: StepTimer

    def __call__(self, plan: StepPlan, segment: Segment) -> None:
        """Take the step that ``plan`` describes on the segment's next batches. Collective."""
        state, instruments = self.state, self.instruments
        instruments.begin(plan)
        state.optimizer.set_schedule(plan.lr_multiplier, plan.muon_momentum)
        sums, digest = self.accumulate(segment.batches, plan)
        with self.meter.phase("optimizer"):
            grad_norm = state.clip_gradients()
            instruments.before_update(plan)
            state.optimizer.step(skip=(~grad_norm.isfinite()).float())
            state.optimizer.zero_grad()
            state.ema.update()
        sums |= instruments.contributions()
        segment.submit(plan, sums, instruments.host_contributions(), digest, grad_norm)

    def accumulate(self, batches: Iterator[Batch], plan: StepPlan) -> tuple[Sums, int]:
        """Run forward and backward of every micro-batch; gradients are reduced in the last one.

        Returns:
            This rank's sums of the parts of the loss, and its digest of the data (64 bits).
        """
        sums: Sums = {}
        digest = 0
        for index in self.state.schedule.micro_batches(self.layout.num_micro):
            with self.meter.phase("data_wait"):
                batch = next(batches)
            with self.meter.phase("forward"):
                batch_on_device = batch.to(self.state.world.device, non_blocking=True)
                loss, parts = self.loss(batch_on_device, plan, index)
            with self.meter.phase("backward"):
                _nan_unless_finite(loss).backward()
                self.instruments.probe.measure()
            digest += batch.digest
            sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
        return sums, digest % 2**64


def _nan_unless_finite(loss: Tensor) -> Tensor:
    """Make the gradients NaN if the loss is not finite, so that every rank sees it in the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
