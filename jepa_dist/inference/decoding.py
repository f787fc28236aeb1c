"""Token-by-token generation with a KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_dist.errors import UserError
from jepa_dist.generate import draw, next_logits
from jepa_dist.model.cache import KVCache
from jepa_dist.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token from the logits.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from this many most likely tokens; None: from all."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities reach this sum; None: from all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        rules = [
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                f"temperature={self.temperature}: expected a number from 0",
            ),
            (
                self.top_k is None or self.top_k >= 1,
                f"top_k={self.top_k}: expected a number of tokens from 1",
            ),
            (
                self.top_p is None or 0 < self.top_p <= 1,
                f"top_p={self.top_p}: expected a probability above 0 and at most 1",
            ),
            (0 <= self.seed < 2**63, f"seed={self.seed}: expected an integer from 0 to 2**63 - 1"),
        ]
        problems = [problem for holds, problem in rules if not holds]
        if problems:
            raise UserError(*problems)


@torch.no_grad()
def continue_ids(
    model: GPT,
    ids: Sequence[int],
    num_tokens: int,
    *,
    phase: int,
    sampling: Sampling,
    device: torch.device,
) -> Iterator[int]:
    """Yield ``num_tokens`` more ids, each drawn from the model's prediction.

    Draws the same as ``generate.generate`` for the same seed. Up to ``model.seq_len`` positions a
    token costs a pass over one position. Beyond, the context is a window of the last
    ``model.seq_len`` ids, so all its states change with each token: a token costs a pass over the
    whole window. Rows longer than in training (with a rescaled rotary base) are never run.

    Args:
        model: An unsharded model, not compiled.
        ids: At least one id.
        num_tokens: Number of ids to yield.
        phase: Recurrence phase to run the model in.
        sampling: Settings for drawing ids.
        device: Where the model is.
    """
    context = list(ids)
    length = min(model.config.seq_len, len(context) + num_tokens)
    cache = KVCache(model.config, phase=phase, length=length)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(num_tokens):
        if len(context) > length:
            logits_V = next_logits(model, context, phase, device)
        else:
            logits_V = _cached_logits(model, context, cache, phase, device)
        context.append(_draw(logits_V, sampling, generator))
        yield context[-1]


def _cached_logits(
    model: GPT, context: list[int], cache: KVCache, phase: int, device: torch.device
) -> Tensor:
    """Logits after the last id of ``context``, float64 [V] on the CPU."""
    # Less work per operator than under no_grad; no tensor created here outlives the cache.
    with torch.inference_mode():
        new_BT = torch.tensor([context[cache.used :]], device=device)
        logits_BTV = model(new_BT, phase=phase, cache=cache).logits_BTV
    return logits_BTV[0, -1].cpu().double()


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return draw(logits_V, 0, generator)
    return draw(restrict(logits_V / sampling.temperature, sampling), 1.0, generator)


def restrict(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits with those outside of top k and top p at minus infinity, [V].

    Top p is applied to the probabilities of the top k. The most likely token is always kept.
    """
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True, stable=True)
        probability_V = sorted_V.softmax(0)
        before_V = probability_V.cumsum(0) - probability_V
        dropped_V = torch.zeros_like(before_V, dtype=torch.bool)
        dropped_V[order_V] = before_V >= sampling.top_p
        dropped_V[order_V[0]] = False
        logits_V = logits_V.masked_fill(dropped_V, -math.inf)
    return logits_V
