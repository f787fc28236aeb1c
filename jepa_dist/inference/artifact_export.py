"""``jepa_dist export --format artifact``: calibrate, quantize and write, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jepa_dist.build import build_gpt
from jepa_dist.config import Config
from jepa_dist.evaluate.quantized import read_calibration
from jepa_dist.evaluate.settings import CALIBRATION
from jepa_dist.inference.stored import Stored
from jepa_dist.parallel.shard import InitialValue
from jepa_dist.parallel.world import World
from jepa_dist.quantize.artifact import artifact_name, brotli, write_artifact
from jepa_dist.quantize.gptq import QuantizedMatrix
from jepa_dist.quantize.quantized_model import quantize_model


@dataclass(frozen=True)
class Plan:
    """A checked export, before there is a process group."""

    stored: Stored
    config: Config
    tokens: npt.NDArray[np.int64]
    """Calibration sequences, [sequences, T]."""


def plan_artifact(stored: Stored, overrides: Sequence[str]) -> Plan:
    """Check settings and data, and read the calibration sequences.

    Raises:
        UserError: brotli is not installed, settings that are unknown or without effect, no training
            data, or fewer sequences than requested.
    """
    brotli()
    config = CALIBRATION.resolve(stored.description.config, overrides)
    return Plan(stored, config, read_calibration(config))


def export_artifact(plan: Plan, out: Path, world: World) -> str:
    """Write the artifact into the folder ``out``; return a line that describes it. Collective.

    Raises:
        UserError: on every rank: weights that cannot be quantized, or the file cannot be written.
    """
    config, description = plan.config, plan.stored.description
    eager = config.parallel.model_copy(
        update={"compile": False, "activation_checkpointing": "none"}
    )
    model, _ = build_gpt(
        config.model, eager, world, values_of(plan.stored), bos_id=config.data.bos_id
    )
    parameters = quantize_model(
        model,
        plan.tokens,
        config.quantization,
        phase=description.phase,
        micro=config.batch.micro,
        world=world,
    )
    used = description.config.model_copy(update={"quantization": config.quantization})
    path = out / artifact_name(description.weights)
    described = description.model_copy(update={"config": used})
    size = world.run_on_main(lambda: write_artifact(path, parameters, described))
    matrices = sum(isinstance(stored, QuantizedMatrix) for stored in parameters.values())
    return (
        f"{path}: {size:,} bytes; {matrices} matrices quantized, {len(parameters) - matrices} "
        f"tensors in float16, calibrated on {len(plan.tokens)} sequences"
    )


def values_of(stored: Stored) -> InitialValue:
    """Return the function that gives ``build_gpt`` the stored weights."""

    def value(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
        return stored.tensors[name].to(device)

    return value
