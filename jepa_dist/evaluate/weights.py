"""A trained model for evaluation: from what a run leaves behind to shards on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_dist.build import build_gpt
from jepa_dist.config import ParallelConfig
from jepa_dist.errors import UserError
from jepa_dist.interop.safetensors_io import (
    Description,
    Weights,
    check_tensors,
    find_export,
    import_weights,
    read_description,
)
from jepa_dist.model.gpt import GPT
from jepa_dist.parallel.world import World


@dataclass(frozen=True)
class Source:
    """Where weights are, and what they are."""

    path: Path
    description: Description


def find_weights(path: Path, weights: Weights) -> Source:
    """What ``path`` stands for, looked at closely enough to know that it can be loaded.

    Args:
        path: A run directory, a folder with an exported model, or its .safetensors file.
        weights: The parameters themselves or their average.

    Raises:
        UserError: nothing there, the other weights, a damaged file, or tensors that are not the
            described model's; all of those are listed.
    """
    file = find_export(path, weights)
    description = read_description(file)
    if description.weights != weights:
        raise UserError(
            f"{file}: holds {description.weights} weights, but {weights} weights were asked for; "
            f"{'drop' if weights == 'ema' else 'add'} --ema"
        )
    with torch.device("meta"):
        check_tensors(file, GPT(description.config.model))
    return Source(file, description)


def load_model(source: Source, parallel: ParallelConfig, world: World) -> GPT:
    """The model with its weights, sharded and compiled as in training. On every rank alike."""
    model, _ = build_gpt(source.description.config.model, parallel, world, _nothing)
    load_weights(source, model)
    return model


def load_weights(source: Source, model: nn.Module) -> None:
    """Fill this rank's shards. The one place that knows the kinds of sources there are."""
    import_weights(source.path, model)


def _nothing(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
    """A placeholder that takes no memory."""
    return torch.zeros((), device=device).expand(shape)
