"""Text generation, token by token; also works while the model is sharded.

Every token takes one forward pass over one row of ``seq_len`` positions, whatever the length of the
text so far: always the same shape, never longer than in training (no rotary rescale), no KV cache.
This is slow and meant for an occasional short sample; ``inference.decoding`` is faster, but needs
an unsharded model. The passes are not compiled: nothing else would use a graph of this shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.joint import JointModel


@torch.no_grad()
def generate(
    model: GPT | JointModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    phase: int,
    device: torch.device,
) -> str:
    """Return the prompt, as the start of a document, continued by ``num_tokens`` tokens.

    Collective where the model is sharded: every rank makes the same number of passes, each with
    the tokens it has sampled itself. FSDP units may still be gathered afterwards (release them).

    Args:
        model: The model; its vocabulary is the tokenizer's.
        tokenizer: Encodes the prompt and decodes the result.
        prompt: Beginning of the text; may be empty.
        num_tokens: How many tokens to add.
        temperature: Logits are divided by this before sampling; 0 takes the most likely token.
        seed: Of the sampling; nothing else is random, and no global generator is used.
        phase: Recurrence phase to run the model in.
        device: Where the model is.

    Returns:
        The text; the same on every rank up to the rounding of logits.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt.encode()).tolist()]
    generator = torch.Generator().manual_seed(seed)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(num_tokens):
            logits_V = next_logits(model, ids, phase, device)
            ids.append(draw(logits_V, temperature, generator))
    return tokenizer.decode(ids)


def next_logits(
    model: GPT | JointModel, ids: Sequence[int], phase: int, device: torch.device
) -> Tensor:
    """Return the logits after the last of ``ids``, float64 [V] on the CPU; the context is the last
    ``model.seq_len`` ids."""
    length = model.config.seq_len
    context = ids[-length:]
    tokens_BT = torch.zeros(1, length, dtype=torch.int64)
    tokens_BT[0, : len(context)] = torch.tensor(context)
    logits_BTV = model(tokens_BT.to(device), phase=phase).logits_BTV
    return logits_BTV[0, len(context) - 1].cpu().double()


def draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Sample a token id from softmax(logits / temperature); at 0 return the most likely id."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V / temperature, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
