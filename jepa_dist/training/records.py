"""Fields of a logged step's record, from its plan and the sums over ranks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo

import jepa_dist
from jepa_dist.config import Config, ModelConfig
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.monitor.hardware import peak_flops, resident_gib
from jepa_dist.objectives.objective import Objective
from jepa_dist.parallel.shard import compute_dtype
from jepa_dist.parallel.world import World
from jepa_dist.plan import StepPlan


class KindOfStep(NamedTuple):
    """The properties of a step that determine its FLOPs."""

    phase: int
    """Recurrence phase."""
    is_objective_on: bool


def losses(
    plan: StepPlan, values: Mapping[str, float], objective: Objective
) -> dict[str, float | None]:
    """Return means over the step's global batch; those of JEPA are None while it is off."""
    ce = values["ce"]
    off = {"loss/ce": ce, "loss/jepa": None, "loss/total": ce, "jepa/lambda": plan.jepa_weight}
    if not plan.is_objective_on:
        return off
    metrics = objective.metrics(plan.samples, values)
    if objective.num_rows(objective.config, plan.samples) == 0:  # there is no mean over zero rows
        return {**off, **metrics}
    jepa = values["jepa"]
    total = ce + plan.jepa_weight * jepa
    return {**off, "loss/jepa": jepa, "loss/total": total, **metrics}


def mfu(flops_per_second: float, world: World) -> dict[str, float]:
    """Return the share of the devices' peak FLOPs; empty if the peak is unknown.

    Args:
        flops_per_second: Rate of all devices, over all steps since the last record.
        world: The devices.
    """
    if world.device.type != "cuda":
        return {}
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    if peak is None:
        return {}
    return {"mfu": flops_per_second / (peak * world.world_size)}


def mean_flops(model: ModelConfig, objective: float, steps: Mapping[KindOfStep, int]) -> float:
    """Return the mean FLOPs per trained token over steps of several kinds.

    Args:
        model: The model.
        objective: FLOPs per token of the objective while it is on.
        steps: How many steps there were of each kind.
    """
    flops = sum(
        count * (training_flops_per_token(model, kind.phase) + objective * kind.is_objective_on)
        for kind, count in steps.items()
    )
    return flops / sum(steps.values())


def facts(config: Config, device: torch.device) -> dict[str, str]:
    """Return what affects a run's numbers besides its configuration: what ``auto`` resolves to,
    the kind of device, and the versions of the libraries that compute. Runs that differ in one
    of these cannot be compared in pairs."""
    muon = config.optim.muon_dtype
    on_cuda = device.type == "cuda"
    return {
        "parallel.precision": str(compute_dtype(config.parallel, device)).removeprefix("torch."),
        "parallel.compile": str(config.parallel.compile).lower(),
        "parallel.deterministic": str(config.parallel.deterministic).lower(),
        "optim.muon_dtype": ("bfloat16" if on_cuda else "float32") if muon == "auto" else muon,
        "device": torch.cuda.get_device_name(device) if on_cuda else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if on_cuda else "none",
        "cudnn": str(torch.backends.cudnn.version()) if on_cuda else "none",
        "numpy": np.__version__,
        "jepa_dist": jepa_dist.__version__,
    }


def memory(device: torch.device) -> dict[str, float]:
    """Return this rank's memory in GiB."""
    memory = {"memory/resident_gib": resident_gib()}
    if device.type == "cuda":
        memory |= {
            "memory/allocated_gib": torch.cuda.memory_allocated(device) / 2**30,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / 2**30,
            "memory/device_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        }
    return memory


def kinds_of_work(plan: StepPlan) -> set[str]:
    """Return the kinds of work of a step that have separate compiled graphs."""
    kinds = {"train"}
    if plan.is_objective_on:
        kinds.add("jepa")
    if plan.evaluate:
        kinds.add("evaluate")
    return kinds


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
