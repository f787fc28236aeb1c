"""One micro-batch's share of the loss of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch
from jepa_dist.jepa.loss import JepaLoss, JepaSums
from jepa_dist.model.gpt import GPT
from jepa_dist.plan import StepPlan
from jepa_dist.training.instruments import Probe


@dataclass(frozen=True)
class GlobalLoss:
    """Cross-entropy plus the weighted objective, as sums over rows.

    Both are divided by the *global* number of targets or rows. So sums over ranks and micro-batches
    of what is returned are the global means, however the batch is divided.
    """

    config: Config
    layout: BatchLayout
    model: GPT
    objective: JepaLoss
    probe: Probe

    def __call__(
        self, batch: Batch, plan: StepPlan, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of micro-batch ``index``, and its parts by name (scalars)."""
        sequences, targets = self.config.batch.sequences, batch.targets
        tap = None if plan.spans is None else self.config.jepa.layer
        output = self.model(batch.tokens, targets, batch.weight, phase=plan.phase, tap=tap)
        ce = output.loss_sum / (sequences * targets.size(1))
        if plan.spans is None:
            zero = torch.zeros_like(ce)
            return ce, {"ce": ce, "jepa": zero, "floored": zero}
        tap_BTD = output.tap_BTD
        if plan.probe and index == 0:
            tap_BTD = self.probe.watch(tap_BTD, batch.tokens, len(self.layout.micro_rows(0)))
        sums = self._jepa_loss_fn(tap_BTD, batch, plan, index)
        jepa = sums.loss / max(1, plan.num_span_rows)
        return ce + plan.jepa_weight * jepa, {"ce": ce, "jepa": jepa, "floored": sums.floored}

    def _jepa_loss_fn(self, tap_BTD: Tensor, batch: Batch, plan: StepPlan, index: int) -> JepaSums:
        """Run the objective on this micro-batch's spans; rows without any do not count."""
        assert plan.spans is not None
        rows = self.layout.micro_rows(index)
        spans_BS2 = torch.zeros(len(batch.weight), *plan.spans.shape[1:], dtype=torch.int64)
        spans_BS2[: len(rows)] = torch.from_numpy(plan.spans[rows.start : rows.stop])
        if tap_BTD.is_cuda:
            spans_BS2 = spans_BS2.pin_memory()
        spans_BS2 = spans_BS2.to(tap_BTD.device, non_blocking=True)
        weight_B = batch.weight * (spans_BS2[:, 0, 0] > 0)
        return self.objective(tap_BTD, spans_BS2.clamp(min=1), weight_B)
