"""A trained model for evaluation: from what a run leaves behind to shards on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_dist.build import build_gpt
from jepa_dist.config import ParallelConfig, flatten
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
from jepa_dist.parallel.shard import fsdp_modules, local_slices
from jepa_dist.parallel.world import World
from jepa_dist.quantize.artifact import SUFFIX, Artifact, read_artifact


@dataclass(frozen=True)
class Source:
    """Where weights are, and what they are."""

    path: Path
    description: Description
    artifact: Artifact | None = None
    """The contents of a quantized artifact, which is small; None: read from ``path``."""


def find_weights(path: Path, weights: Weights) -> Source:
    """What ``path`` stands for, looked at closely enough to know that it can be loaded.

    Args:
        path: A run directory, a folder with an exported model, its .safetensors file, or a
            quantized artifact.
        weights: The parameters themselves or their average.

    Raises:
        UserError: nothing there, the other weights, a damaged file, or tensors that are not the
            described model's; all of those are listed.
    """
    if path.suffix == SUFFIX:
        # It is what it is: there is no other file to be asked for.
        artifact = read_artifact(path)
        return Source(path, artifact.description, artifact)
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


def check_comparable(source: Source, other: Source) -> None:
    """Raise unless two models can be loaded into one.

    Raises:
        UserError: their architectures differ; all differences are listed.
    """
    ours, theirs = (
        dict(flatten(each.description.config.model.model_dump())) for each in (source, other)
    )
    differences = [
        f"model.{key} is {ours[key]!r} there and {theirs[key]!r} here"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if differences:
        raise UserError(
            f"{other.path}: cannot be compared with {source.path}: {'; '.join(differences)}"
        )


def load_model(source: Source, parallel: ParallelConfig, world: World) -> GPT:
    """The model with its weights, sharded and compiled as in training. On every rank alike."""
    model, _ = build_gpt(source.description.config.model, parallel, world, _nothing)
    load_weights(source, model)
    return model


@torch.no_grad()
def load_weights(source: Source, model: nn.Module) -> None:
    """Fill this rank's shards. The one place that knows the kinds of sources there are."""
    for unit in fsdp_modules(model):  # copies of earlier weights may still be gathered
        unit.reshard()
    if source.artifact is None:
        import_weights(source.path, model)
        return
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() > 0:
            local.copy_(source.artifact.tensor(name)[local_slices(parameter)])


def _nothing(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
    """A placeholder that takes no memory."""
    return torch.zeros((), device=device).expand(shape)
