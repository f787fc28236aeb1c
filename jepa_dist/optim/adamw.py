"""AdamW on parameter shards: torch's fused kernel, with state that exists from the start.

``torch.optim.AdamW`` runs on DTensors too, but sends every one of them through DTensor's dispatch
(0.94 against 0.24 ms of host time for 61 vectors), refuses DTensors and plain tensors in one
group, and creates its state only at the first step, but a checkpoint is loaded before that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from jepa_dist.optim.local_shards import local, local_gradient


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, then the bias-corrected Adam step with eps outside the root.

    A parameter without gradient is skipped entirely: no decay, no step count (golden README
    section 4). State per parameter: ``exp_avg`` and ``exp_avg_sq``, placed like the parameter,
    and ``adam_step``, a 0-dim float32 tensor that is the same on every rank.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "exp_avg": torch.zeros_like(p, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                    "adam_step": torch.zeros((), device=p.device),
                }

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place; shards only, no communication.

        Args:
            skip: See ``Optimizer.step``.
        """
        for group in self.param_groups:
            self._step_group(group, skip)

    def _step_group(self, group: dict[str, Any], skip: Tensor | None) -> None:
        present = [p for p in group["params"] if p.grad is not None]
        filled = [p for p in present if local(p).numel()]
        # The step of an empty shard is counted, too: a checkpoint may store any rank's count.
        if len(filled) < len(present):
            empty = [p for p in present if not local(p).numel()]
            counts = [self.state[p]["adam_step"] for p in empty]
            torch._foreach_add_(counts, 1.0 if skip is None else 1 - skip)
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in filled],
            [local_gradient(p) for p in filled],
            [local(self.state[p]["exp_avg"]) for p in filled],
            [local(self.state[p]["exp_avg_sq"]) for p in filled],
            [],
            [self.state[p]["adam_step"] for p in filled],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
