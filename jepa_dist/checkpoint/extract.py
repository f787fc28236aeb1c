"""Read the model from a checkpoint: unsharded tensors and their description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from jepa_dist.checkpoint.manifest import STATE, read_manifest, read_state
from jepa_dist.checkpoint.shard_file import ShardFiles, assemble
from jepa_dist.config import Config
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.interop.safetensors_io import Description, Weights
from jepa_dist.interop.tensor_file import LazyTensors
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.objectives.objective import is_objectives

_PREFIXES: dict[Weights, str] = {"live": "model/", "ema": "ema/"}


def read_model(path: Path, weights: Weights) -> tuple[Description, Mapping[str, Tensor]]:
    """Return the model, without objective, in a checkpoint saved by any number of ranks.

    Args:
        path: The checkpoint, already verified.
        weights: The parameters themselves or their moving average.

    Returns:
        The description of the tensors, and the tensors by parameter name, on the CPU; each is
        read when it is looked up.

    Raises:
        UserError: it holds no such weights, or its state is not that of a training run.
    """
    manifest, state = read_manifest(path), read_state(path)
    prefix = _PREFIXES[weights]

    def read(name: str) -> Tensor:
        with ShardFiles(path) as files:
            return assemble(files, f"{prefix}{name}", manifest.tensors[f"{prefix}{name}"])

    names = [
        name.removeprefix(prefix)
        for name in manifest.tensors
        if name.startswith(prefix) and not is_objectives(name)
    ]
    tensors = LazyTensors(names, read)
    if not tensors:
        raise UserError(
            f"{path}: holds no {prefix} tensors"
            + ("; the run had no moving average (optim.ema_decay=0)" if weights == "ema" else "")
        )
    description = Description(
        step=manifest.step, phase=_phase(path, state), weights=weights, config=_config(path, state)
    )
    return description, tensors


def _phase(path: Path, state: Mapping[str, Any]) -> int:
    phase = state.get("phase")
    if type(phase) is not int or not 0 <= phase <= LAST_PHASE:
        raise UserError(
            f"{path / STATE}: phase={phase!r:.60}: expected a recurrence phase of 0 to "
            f"{LAST_PHASE}; not the state of a training run"
        )
    return phase


def _config(path: Path, state: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate_json(json.dumps(state.get("config")))
    except ValidationError as error:
        raise UserError(
            *(
                f"{path}: config: {field}; export it with the version of jepa_dist that wrote it"
                for field in invalid_fields(error)
            )
        ) from None
