"""Next-state prediction (NITP, arXiv 2605.24956): a state predicts a later, shallower state.

    u = rms_norm(h)                                     (h: ``jepa.layer`` at position t)
    p = u, W u, or W_down (silu(W_gate u) * W_up u)     (``jepa.next_state.head``)
    z = stop_gradient(target layer's state at t + shift)
    loss = mean of 1 - cos(p, z)

The mean is over all sequences and all T - shift positions. A position whose target begins a
document is not counted (``within_documents``), but the divisor is the same, so that it is known
without communication. See docs/objective.md.

Tensor names carry their shape: B batch, T sequence, P = T - shift positions, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import Config
from jepa_dist.model.gpt import OutputLayer
from jepa_dist.model.layers import rms_norm
from jepa_dist.objectives.cosine import floored_cosine
from jepa_dist.objectives.diagnostics import effective_rank, mean_pairwise_cosine
from jepa_dist.objectives.objective import Objective, Samples, Sums, continues_document
from jepa_dist.objectives.probe import TapProbe


class NextStateObjective(Objective):
    """Objective that reads two layers and samples nothing; its parameters are the head's (no bias).

    ``proj.weight`` of a linear head, ``gate.weight``, ``up.weight`` and ``down.weight`` of a swiglu
    one, [out, in]. None is initialized to zero: the cosine of a zero prediction has an unbounded
    gradient.
    """

    def __init__(self, config: Config, bos_id: int | None) -> None:
        super().__init__(config, bos_id)
        settings, width = config.jepa.next_state, config.model.model_dim
        self._shift = settings.shift
        self._head = settings.head
        self._stop_gradient = settings.stop_gradient
        self._norm_floor = config.jepa.norm_floor
        self._bos_id = bos_id if settings.within_documents else None
        hidden = settings.hidden(width)
        if self._head == "linear":
            self.proj = nn.Linear(width, width, bias=False)
        if self._head == "swiglu":
            self.gate = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(width, hidden, bias=False)
            self.down = nn.Linear(hidden, width, bias=False)

    @property
    def taps(self) -> tuple[int, ...]:
        """Return the predicting layer and the target layer."""
        jepa = self.config.jepa
        return jepa.layer, jepa.next_state.target(self.config.model.num_layers)

    def forward(
        self,
        states: Sequence[Tensor],
        tokens_BT: Tensor,
        weight_B: Tensor,
        samples: Tensor | None,
        output_layer: OutputLayer | None = None,
    ) -> Sums:
        """Return the loss summed over the given rows.

        And sums over counted positions: their cosines, their number, and how many of them have a
        norm at the floor.
        """
        h_BTD, target_BTD = states
        num_positions = h_BTD.size(1) - self._shift
        p_BPD = self.predict(h_BTD[:, :num_positions])
        z_BPD = target_BTD[:, self._shift :]
        if self._stop_gradient:
            z_BPD = z_BPD.detach()
        cosine_BP, floored_BP = floored_cosine(p_BPD, z_BPD, self._norm_floor)
        targets_BP = tokens_BT[:, self._shift :]
        counts_BP = weight_B[:, None] * continues_document(targets_BP, self._bos_id)
        loss = (counts_BP * (1 - cosine_BP)).sum() / num_positions
        parts = {
            "cosines": (counts_BP * cosine_BP.detach()).sum(),
            "counted": counts_BP.sum(),
            "floored": (counts_BP * floored_BP).sum(),
        }
        return Sums(loss, {name: value.float() for name, value in parts.items()})

    def predict(self, h_BPD: Tensor) -> Tensor:
        """Return the head's prediction from the states of some positions."""
        u_BPD = rms_norm(h_BPD)
        if self._head == "none":
            return u_BPD
        if self._head == "linear":
            return self.proj(u_BPD)
        return self.down(F.silu(self.gate(u_BPD)) * self.up(u_BPD))

    def metrics(self, samples: Samples | None, values: Mapping[str, float]) -> dict[str, float]:
        """Return means over the counted positions, and the share of positions that count.

        ``jepa/relative`` is the loss of a counted position: 1 for predictions without any relation
        to their targets.
        """
        config, counted = self.config, values["counted"]
        positions = config.batch.sequences * (config.model.seq_len - self._shift)
        metrics = {"jepa/counted": counted / positions}
        if counted:
            cosine = values["cosines"] / counted
            metrics |= {
                "jepa/cos": cosine,
                "jepa/relative": 1 - cosine,
                "jepa/floored": values["floored"] / counted,
            }
        return metrics

    @property
    def flops_per_token(self) -> float:
        """Return 6 per element of the head's matrices, at the positions that predict."""
        seq_len = self.config.model.seq_len
        size = sum(parameter.numel() for parameter in self.parameters())
        return 6.0 * size * (seq_len - self._shift) / seq_len

    def probe(self, bos_id: int | None, device: torch.device) -> TapProbe:
        """Return the probe that also looks at the target states."""
        return _TargetProbe()


class _TargetProbe(TapProbe):
    """Rank and anisotropy of the target states besides those of the predicting ones."""

    def means(self, states: Sequence[Tensor], tokens_BT: Tensor) -> Mapping[str, Tensor]:
        target_BTD = states[1]
        return {
            "target_effective_rank": effective_rank(target_BTD),
            "target_mean_cosine": mean_pairwise_cosine(target_BTD),
        }
