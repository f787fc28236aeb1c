"""Load a trained model for evaluation: from a run's files to shards on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_dist.build import build_gpt
from jepa_dist.config import Config, ModelConfig, ParallelConfig
from jepa_dist.errors import UserError
from jepa_dist.interop.hf.export_folder import is_hf_folder, read_folder
from jepa_dist.interop.parameter_golf import read_final_model, translate
from jepa_dist.interop.safetensors_io import (
    Description,
    Weights,
    check_tensors,
    find_export,
    import_weights,
    read_description,
)
from jepa_dist.interop.tensor_file import LazyTensors, lazy_tensors
from jepa_dist.model.gpt import GPT
from jepa_dist.parallel.shard import fsdp_modules, local_slices
from jepa_dist.parallel.world import World
from jepa_dist.quantize.artifact import find_artifact, read_artifact


@dataclass(frozen=True)
class Source:
    """Location and description of weights."""

    path: Path
    description: Description
    tensors: Mapping[str, Tensor] | None = None
    """Weights that are not one safetensors file; None: each rank reads its parts of ``path``."""

    def value(self, name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
        """Return a parameter, as a model's initial value."""
        tensors = lazy_tensors(self.path) if self.tensors is None else self.tensors
        return tensors[name].to(device)


def find_weights(path: Path, weights: Weights | None) -> Source:
    """Return the weights at ``path``, checked so that they can be loaded.

    Args:
        path: A run directory, a folder with an exported model, its .safetensors file, a
            quantized artifact, or a folder written for transformers.
        weights: The parameters themselves or their average; None: those at ``path``, the
            parameters if there are both.

    Raises:
        UserError: no weights, the other weights, a damaged file, or tensors that do not match the
            described model; all of them are listed.
    """
    source = _find(path, weights or "live")
    found = source.description.weights
    if weights not in (None, found):
        raise UserError(
            f"{source.path}: holds {found} weights, but {weights} weights were asked for; "
            f"{'drop' if weights == 'ema' else 'add'} --ema"
        )
    if source.tensors is None:
        with torch.device("meta"):
            check_tensors(source.path, GPT(source.description.config.model))
    return source


def _find(path: Path, weights: Weights) -> Source:
    quantized = find_artifact(path, weights)
    if quantized is not None:
        artifact = read_artifact(quantized)
        tensors = LazyTensors(artifact.parameters, artifact.tensor)
        return Source(quantized, artifact.description, tensors)
    if is_hf_folder(path):
        return Source(path, *read_folder(path))
    file = find_export(path, weights)
    return Source(file, read_description(file))


def find_initial(path: Path, config: Config) -> Source:
    """Return the weights that a new run starts from (``train.init_from``).

    Args:
        path: As for ``find_weights``, or a ``final_model.pt``.
        config: The run.

    Raises:
        UserError: as ``find_weights``, or another architecture; all differences are listed.
    """
    if path.suffix == ".pt":
        with torch.device("meta"):
            model = GPT(config.model)
        tensors = translate(read_final_model(path), model, str(path))
        return Source(path, Description(step=None, phase=0, weights="live", config=config), tensors)
    source = find_weights(path, None)
    # The attention mask does not affect the weights.
    seen = config.model.model_dump(include={"document_mask", "reset_positions"})
    differences = _differences(
        source.description.config.model.model_copy(update=seen), config.model
    )
    if differences:
        raise UserError(f"train.init_from={path}: another architecture: {differences}")
    return source


def check_comparable(source: Source, other: Source) -> None:
    """Raise unless two models can be loaded into the same module.

    Raises:
        UserError: their architectures differ; all differences are listed.
    """
    differences = _differences(other.description.config.model, source.description.config.model)
    if differences:
        raise UserError(f"{other.path}: cannot be compared with {source.path}: {differences}")


def _differences(theirs: ModelConfig, ours: ModelConfig) -> str:
    """Return what makes two architectures incompatible, in one line; ignores initial values."""

    def relevant(model: ModelConfig) -> dict[str, object]:
        values: dict[str, object] = model.model_dump(exclude={"tied_embed_init_std"})
        values["embedding_dim"] = model.embed_width
        if model.qk_gain_init is not None:
            values["qk_gain_init"] = "a number"
        return values

    there, here = relevant(theirs), relevant(ours)
    return "; ".join(
        f"model.{key} is {there[key]!r} there and {value!r} here"
        for key, value in here.items()
        if there[key] != value
    )


def load_model(source: Source, parallel: ParallelConfig, world: World) -> GPT:
    """Return the model, sharded and compiled as in training. Call on every rank."""
    config = source.description.config
    model, _ = build_gpt(config.model, parallel, world, _nothing, bos_id=config.data.bos_id)
    load_weights(source, model)
    return model


@torch.no_grad()
def load_weights(source: Source, model: nn.Module) -> None:
    """Fill this rank's shards, from any kind of source."""
    for unit in fsdp_modules(model):  # copies of earlier weights may still be gathered
        unit.reshard()
    if source.tensors is None:
        import_weights(source.path, model)
        return
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() > 0:
            local.copy_(source.tensors[name][local_slices(parameter)])


def _nothing(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
    """Return a placeholder that takes no memory."""
    return torch.zeros((), device=device).expand(shape)
