"""Next-latent prediction (NextLat, arXiv 2511.05963): a state and the next token predict the state
at the next position.

    u    = rms_norm(h)                                  (h: ``jepa.layer``)
    p    = u_t + MLP([u_t, embedding of token t + 1])   (three matrices, GELU between them)
    z    = stop_gradient(u_{t+1})
    loss = mean of smooth_l1(p, z) + kl * KL(head(z) || head(p))

``head`` is the model's output layer without gradient: the KL divergence trains the prediction, not
the head. The mean is over all sequences and all T - 1 positions; a position whose next token begins
a document is not counted (``within_documents``), but the divisor is the same, so that it is known
without communication. See docs/objective.md.

Tensor names carry their shape: B batch, T sequence, P = T - 1 positions, N = B * P, D model width,
E embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import Config
from jepa_dist.model.gpt import EMBEDDED, OutputLayer
from jepa_dist.model.head import capped_logits, num_chunks
from jepa_dist.model.layers import rms_norm
from jepa_dist.objectives.cosine import at_least_float32
from jepa_dist.objectives.objective import Objective, Samples, Sums, continues_document


class NextLatentObjective(Objective):
    """Objective that reads one layer and the embedded tokens, and samples nothing; its parameters
    are the MLP's (no bias): ``enter.weight``, ``middle.weight`` and ``leave.weight``, [out, in]."""

    def __init__(self, config: Config, bos_id: int | None) -> None:
        super().__init__(config, bos_id)
        settings, width = config.jepa.next_latent, config.model.model_dim
        self._kl_weight = settings.kl
        self._softcap = config.model.logit_softcap
        self._bos_id = bos_id if settings.within_documents else None
        hidden = settings.hidden(width)
        self.enter = nn.Linear(2 * width, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden, bias=False)
        self.leave = nn.Linear(hidden, width, bias=False)

    @property
    def taps(self) -> tuple[int, ...]:
        """Return the predicted layer and the embedding."""
        return self.config.jepa.layer, EMBEDDED

    @property
    def reads_output_layer(self) -> bool:
        """Whether the loss contains the KL divergence."""
        return self._kl_weight > 0

    def forward(
        self,
        states: Sequence[Tensor],
        tokens_BT: Tensor,
        weight_B: Tensor,
        samples: Tensor | None,
        output_layer: OutputLayer | None = None,
    ) -> Sums:
        """Return the loss summed over the given rows.

        And sums over counted positions: their number, the distance from prediction to target, that
        from the present state to it, and the KL divergence.
        """
        h_BTD, embedded_BTD = states
        u_BTD = rms_norm(h_BTD)
        u_BPD, z_BPD = u_BTD[:, :-1], u_BTD[:, 1:].detach()
        p_BPD = self.predict(u_BPD, embedded_BTD[:, 1:])
        counts_BP = weight_B[:, None] * continues_document(tokens_BT[:, 1:], self._bos_id)
        loss = (counts_BP * _distance(p_BPD, z_BPD)).sum()
        parts = {
            "counted": counts_BP.sum(),
            "distance": loss.detach(),
            "unchanged": (counts_BP * _distance(u_BPD.detach(), z_BPD)).sum(),
        }
        if output_layer is not None:
            kl = divergence_sum(p_BPD, z_BPD, counts_BP, output_layer, self._softcap)
            parts["kl"] = kl.detach()
            loss = loss + self._kl_weight * kl
        sums = {name: value.float() for name, value in parts.items()}
        return Sums(loss / counts_BP.size(1), sums)

    def predict(self, u_BPD: Tensor, next_BPD: Tensor) -> Tensor:
        """Return the predicted next states.

        Args:
            u_BPD: Normalized states.
            next_BPD: Embeddings of the tokens that follow them.
        """
        x_BPH = F.gelu(self.enter(torch.cat((u_BPD, next_BPD), dim=-1)))
        return u_BPD + self.leave(F.gelu(self.middle(x_BPH)))

    def metrics(self, samples: Samples | None, values: Mapping[str, float]) -> dict[str, float]:
        """Return means over the counted positions, and the share of positions that count.

        ``jepa/relative`` is the distance from the prediction to the next state, relative to the
        distance of the present state to it: 1 for predictions that nothing changes.
        """
        config, counted = self.config, values["counted"]
        positions = config.batch.sequences * (config.model.seq_len - 1)
        metrics = {"jepa/counted": counted / positions}
        if counted:
            metrics["jepa/distance"] = values["distance"] / counted
        if values["unchanged"]:
            metrics["jepa/relative"] = values["distance"] / values["unchanged"]
        if counted and "kl" in values:
            metrics["jepa/kl"] = values["kl"] / counted
        return metrics

    @property
    def flops_per_token(self) -> float:
        """Return 6 per element of the MLP's matrices, and with the KL divergence as many per
        element of the output layer: two forward passes, and a backward to the prediction."""
        model = self.config.model
        size = sum(parameter.numel() for parameter in self.parameters())
        if self.reads_output_layer:
            width, embed_width = model.model_dim, model.embed_width
            size += embed_width * model.vocab_size
            size += embed_width * width if embed_width != width else 0
        return 6.0 * size * (model.seq_len - 1) / model.seq_len


def _distance(p_BPD: Tensor, z_BPD: Tensor) -> Tensor:
    """Return the smooth L1 distance (beta 1), mean over the width: [B, P], at least float32."""
    p_BPD, z_BPD = at_least_float32(p_BPD), at_least_float32(z_BPD)
    return F.smooth_l1_loss(p_BPD, z_BPD, reduction="none").mean(-1)


def divergence_sum(
    p_BPD: Tensor, z_BPD: Tensor, counts_BP: Tensor, output_layer: OutputLayer, softcap: float
) -> Tensor:
    """Return the weighted sum of KL(head(z) || head(p)) in nats, float32 scalar.

    Args:
        p_BPD: Predicted states, normalized; the only input that gets a gradient.
        z_BPD: States that are predicted.
        counts_BP: Weight of each position in the sum.
        output_layer: Matrices of the head.
        softcap: Soft cap of the logits; 0: none.
    """
    head_VE, proj_ED = output_layer
    y_NE, target_NE = (
        (x if proj_ED is None else F.linear(x, proj_ED)).flatten(0, 1) for x in (p_BPD, z_BPD)
    )
    total: Tensor = _Divergence.apply(y_NE, target_NE, counts_BP.flatten(), head_VE, softcap)
    return total


class _Divergence(torch.autograd.Function):
    """A KL divergence whose forward computes the gradient, in chunks; backward only scales it (as
    in ``model/head.py``)."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NE: Tensor,
        target_NE: Tensor,
        counts_N: Tensor,
        head_VE: Tensor,
        softcap: float,
    ) -> Tensor:
        losses, grads_y = [], []
        number = num_chunks(len(y_NE), len(head_VE))
        pieces = (tensor.chunk(number) for tensor in (y_NE, target_NE, counts_N))
        for y, target, counts in zip(*pieces, strict=True):
            logits = capped_logits(y, head_VE, softcap)
            log_p = F.log_softmax(logits, dim=-1)
            log_z = F.log_softmax(capped_logits(target, head_VE, softcap), dim=-1)
            losses.append((counts * (log_z.exp() * (log_z - log_p)).sum(-1)).sum())
            grad_logits = counts[:, None] * (log_p.exp() - log_z.exp())
            if softcap > 0:
                grad_logits = grad_logits * (1 - (logits / softcap).square())  # tanh' = 1 - tanh^2
            grads_y.append(grad_logits.to(y.dtype) @ head_VE)
        ctx.save_for_backward(torch.cat(grads_y))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Scale in float32: a factor such as 1 / tokens of the global batch is inexact in bfloat16.
        (grad_y_NE,) = ctx.saved_tensors
        return (grad_y_NE.float() * grad).to(grad_y_NE.dtype), None, None, None, None
