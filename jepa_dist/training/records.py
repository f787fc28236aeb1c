"""What a logged step's record says, from its plan and the numbers that the ranks added up."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import numpy as np
import torch
import torch._dynamo

import jepa_dist
from jepa_dist.config import Config, ModelConfig
from jepa_dist.jepa.loss import UNSTRUCTURED_LOSS
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.monitor.hardware import peak_flops, resident_gib
from jepa_dist.parallel.shard import compute_dtype
from jepa_dist.parallel.world import World
from jepa_dist.plan import StepPlan


def losses(plan: StepPlan, values: Mapping[str, float], config: Config) -> dict[str, float | None]:
    """Means over the global batch of this step; JEPA's are None while it is off."""
    ce, jepa = values["ce"], values["jepa"]
    if plan.num_span_rows == 0:  # the objective is off, or no row has a span: no mean to report
        off: dict[str, float | None] = {"loss/ce": ce, "loss/jepa": None, "loss/total": ce}
        left_out = {} if plan.spans is None else _left_out(plan, config)
        return {**off, "jepa/lambda": plan.jepa_weight, **left_out}
    num_spans = plan.num_span_rows * config.jepa.spans_per_sequence
    return {
        "loss/ce": ce,
        "loss/jepa": jepa,
        "loss/total": ce + plan.jepa_weight * jepa,
        "jepa/lambda": plan.jepa_weight,
        "jepa/cos": 1.0 - jepa,
        "jepa/relative": jepa / UNSTRUCTURED_LOSS,
        "jepa/floored": values["floored"] / num_spans,
        **_left_out(plan, config),
    }


def _left_out(plan: StepPlan, config: Config) -> dict[str, float]:
    """Sequences without a span inside one document."""
    if not config.jepa.within_documents:
        return {}
    return {"jepa/rows_without_span": config.batch.sequences - plan.num_span_rows}


def mfu(
    tokens_per_second: float, phases: Mapping[int, int], config: Config, world: World
) -> dict[str, float]:
    """Share of the devices' peak; nothing where the peak is not known.

    Args:
        tokens_per_second: Over all steps since the last record.
        phases: How many of these steps ran in each recurrence phase.
        config: The run.
        world: Its devices.
    """
    if world.device.type != "cuda":
        return {}
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    if peak is None:
        return {}
    return {"mfu": tokens_per_second * mean_flops(config.model, phases) / (peak * world.world_size)}


def mean_flops(model: ModelConfig, phases: Mapping[int, int]) -> float:
    """FLOPs per trained token over steps of several recurrence phases (phase: how many)."""
    flops = sum(count * training_flops_per_token(model, p) for p, count in phases.items())
    return flops / sum(phases.values())


def facts(config: Config, device: torch.device) -> dict[str, str]:
    """What changes the numbers of a run though its configuration does not: what ``auto`` stands
    for here, the kind of device, and the versions of the libraries that compute. Two runs that
    differ in one of these are no pair."""
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
    """Of this rank, in GiB."""
    memory = {"memory/resident_gib": resident_gib()}
    if device.type == "cuda":
        memory |= {
            "memory/allocated_gib": torch.cuda.memory_allocated(device) / 2**30,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / 2**30,
            "memory/device_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        }
    return memory


def kinds_of_work(plan: StepPlan) -> set[str]:
    """What a step did, as far as other graphs are compiled for it."""
    kinds = {"train"}
    if plan.spans is not None:
        kinds.add("jepa")
    if plan.evaluate:
        kinds.add("evaluate")
    return kinds


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
