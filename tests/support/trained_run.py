"""Write a run directory without training: checkpoints and exports of given weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from jepa_dist.checkpoint.shard_file import DTYPES, Part, write_shard
from jepa_dist.config import Config, to_dict
from jepa_dist.interop.safetensors_io import Description, Weights, write_export
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from tests.support.crafted import GOOD_STATE, SHARDS, seal, write_state

PHASE = 2


def noisy_model(config: Config, seed: int = 1) -> GPT:
    """Return a model whose logits differ from token to token."""
    model = GPT(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed + len(name))
            )
            start = initial_value(name, parameter.shape, config.model, 1, torch.device("cpu"))
            parameter.copy_(start + 0.3 * noise)
    return model.requires_grad_(False)


def save_checkpoint(run: Path, step: int, config: Config, model: GPT, average: GPT) -> Path:
    """Write a checkpoint of two ranks: each has one half of the rows of every tensor."""
    path = run / f"checkpoints/step_{step:08d}"
    path.mkdir(parents=True)
    tensors = {f"model/{name}": tensor for name, tensor in model.named_parameters()} | {
        f"ema/{name}": tensor for name, tensor in average.named_parameters()
    }
    entries = {}
    halves: list[dict[str, Part]] = [{}, {}]
    for name, tensor in tensors.items():
        cut = len(tensor) // 2
        chunks = []
        for rank, rows in enumerate((slice(0, cut), slice(cut, None))):
            part = tensor[rows].detach().contiguous()
            offset = (rank * cut, *[0] * (tensor.dim() - 1))
            halves[rank][name] = Part(part, offset)
            chunks.append({"file": SHARDS[rank], "offset": list(offset), "shape": list(part.shape)})
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "chunks": chunks,
        }
    for file, held in zip(SHARDS, halves, strict=True):
        write_shard(path / file, held)
    write_state(path, _state(step, config))
    body = {
        **{"format": 1, "step": step, "saved_at": 1.7e9, "world_size": 2, "healthy": True},
        **{"config_fingerprint": "", "data_fingerprint": "", "torch": "2", "jepa_dist": "0"},
        **{"files": {}, "tensors": entries},
    }
    seal(path, body)
    return path


def _state(step: int, config: Config) -> dict[str, object]:
    return {**GOOD_STATE, "step": step, "phase": PHASE, "config": to_dict(config)}


def save_export(
    run: Path, step: int, config: Config, model: GPT, weights: Weights = "live"
) -> Path:
    """Write model.safetensors, or ema.safetensors."""
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    return write_export(
        run, state, Description(step=step, phase=PHASE, weights=weights, config=config)
    )
