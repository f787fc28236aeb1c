"""Quantize a trained model on any number of ranks to the parameters of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from jepa_dist.config import QuantizationConfig
from jepa_dist.errors import SharedError, UserError
from jepa_dist.interop.safetensors_io import gather
from jepa_dist.model.gpt import GPT
from jepa_dist.parallel.world import World
from jepa_dist.quantize.artifact import Stored, to_float16
from jepa_dist.quantize.calibration import collect_hessians
from jepa_dist.quantize.gptq import QuantizedMatrix, quantize_matrix
from jepa_dist.quantize.policy import precisions


@torch.no_grad()
def quantize_model(
    model: GPT,
    tokens: npt.NDArray[np.int64],
    settings: QuantizationConfig,
    *,
    phase: int,
    micro: int,
    world: World,
) -> dict[str, Stored]:
    """Return every parameter as an artifact stores it. Collective.

    The matrices are divided among the ranks, and each is quantized by one of them. A matrix without
    calibration inputs (an untied embedding, MLPs of repeats that ``phase`` does not run) is
    rounded as if they were independent and equally large.

    Args:
        model: A GPT, not compiled, sharded over ``world``.
        tokens: Calibration sequences, int64 [sequences, T], the same on every rank.
        settings: Bits, ranges and the size from which tensors are quantized.
        phase: Recurrence phase to calibrate in.
        micro: Sequences per pass.
        world: Ranks that share the work.

    Raises:
        SharedError: on every rank: a tensor cannot be stored in this way; all of them are listed.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    chosen = precisions(sizes, model.config, settings)
    hessians = collect_hessians(model, tokens, chosen.keys(), phase=phase, micro=micro, world=world)
    state = gather(model, keep=True)

    def store(name: str) -> Stored:
        if name not in chosen:
            return to_float16(state[name])
        weight_RC = state[name].to(world.device)
        unseen_CC = torch.eye(weight_RC.size(1), dtype=torch.float64, device=world.device)
        return quantize_matrix(
            weight_RC,
            hessians.get(name, unseen_CC),
            bits=chosen[name].bits,
            clip_sigmas=chosen[name].clip_sigmas,
            hessian_clip_lambda=settings.hessian_clip_lambda,
        )

    # Most expensive first, so that all ranks get about the same work.
    order = sorted(state, key=lambda name: (name not in chosen, -sizes[name]))
    done, problems = _attempt(store, order[world.rank :: world.world_size])
    found = [problem for each in world.gather(problems) for problem in each]
    if found:
        raise SharedError(*found)
    everyone: dict[str, Stored] = {}
    for place, name in enumerate(order):
        everyone[name] = _send_stored(
            done.get(name), state[name].shape, name in chosen, place % world.world_size, world
        )
    return {name: everyone[name] for name in state}


def _send_stored(
    stored: Stored | None, shape: torch.Size, is_quantized: bool, owner: int, world: World
) -> Stored:
    """Return what ``owner`` stores of a parameter (None on the others). Collective."""
    if not is_quantized:
        half = torch.empty(shape, dtype=torch.float16) if stored is None else stored
        assert isinstance(half, Tensor)
        return _send(half, owner, world)
    if stored is None:
        stored = QuantizedMatrix(
            torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float16)
        )
    assert isinstance(stored, QuantizedMatrix)
    return QuantizedMatrix(_send(stored.q_RC, owner, world), _send(stored.scale_R, owner, world))


def _send(tensor: Tensor, owner: int, world: World) -> Tensor:
    """Return ``owner``'s tensor; the others' are overwritten. Collective."""
    sent = tensor.contiguous()
    dist.broadcast(sent, owner, group=world.control)
    return sent


def _attempt(
    store: Callable[[str], Stored], names: Iterable[str]
) -> tuple[dict[str, Stored], list[str]]:
    """Return what could be stored, and the problems of the rest."""
    done: dict[str, Stored] = {}
    problems = []
    for name in names:
        try:
            done[name] = store(name)
        except UserError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    return done, problems
