"""One micro-batch's share of the loss of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch
from jepa_dist.data.sources import mixed_names
from jepa_dist.objectives.joint import JointModel, JointOutput, ObjectiveInput
from jepa_dist.plan import StepPlan
from jepa_dist.training.instruments import Probe


@dataclass(frozen=True)
class GlobalLoss:
    """Cross-entropy plus the weighted objective, as sums over rows.

    Both are divided by the *global* number of targets or rows. So the returned values, summed over
    ranks and micro-batches, are the global means, however the batch is divided.
    """

    config: Config
    layout: BatchLayout
    root: JointModel
    probe: Probe

    def __call__(
        self, batch: Batch, plan: StepPlan, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of micro-batch ``index``, and its parts by name (scalars)."""
        sequences, targets = self.config.batch.sequences, batch.targets
        given = self._objective_input(batch, plan, index) if plan.is_objective_on else None
        output = self.root(batch.tokens, targets, batch.weight, phase=plan.phase, objective=given)
        ce = output.loss_sum / (sequences * targets.size(1))
        parts = {"ce": ce, **self._by_source(output, batch)}
        if output.objective is None:
            return ce, parts
        num_rows = self.root.objective.num_rows(self.config, plan.samples)
        jepa = output.objective.loss / max(1, num_rows)
        parts |= {"jepa": jepa, **output.objective.parts}
        return ce + plan.jepa_weight * jepa, parts

    def _by_source(self, output: JointOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the parts ``ce/NAME`` of ``ce`` by source, float64; none without a mixture."""
        if output.row_loss_B is None or batch.sources is None:
            return {}
        names = mixed_names(self.config)
        numbers_S1 = torch.arange(len(names), device=batch.sources.device)[:, None]
        loss_SB = torch.where(batch.sources == numbers_S1, output.row_loss_B.double(), 0.0)
        loss_S = loss_SB.sum(1) / (self.config.batch.sequences * batch.targets.size(1))
        return {f"ce/{name}": loss for name, loss in zip(names, loss_S, strict=True)}

    def _objective_input(self, batch: Batch, plan: StepPlan, index: int) -> ObjectiveInput:
        """Return the objective's inputs of this micro-batch besides the states."""
        rows, samples_B = self.layout.micro_rows(index), None
        if plan.samples is not None:
            samples_B = torch.zeros(len(batch.weight), *plan.samples.shape[1:], dtype=torch.int64)
            samples_B[: len(rows)] = torch.from_numpy(plan.samples[rows.start : rows.stop])
            if batch.weight.is_cuda:
                samples_B = samples_B.pin_memory()
            samples_B = samples_B.to(batch.weight.device, non_blocking=True)
        is_watched = plan.probe and index == 0
        watch = self.probe.watcher(batch.tokens, len(rows)) if is_watched else None
        return ObjectiveInput(batch.weight, samples_B, watch)
