"""What a logged step's record says, from its plan and the numbers that the ranks added up."""

from __future__ import annotations

import torch
import torch._dynamo

from jepa_dist.config import Config
from jepa_dist.jepa.loss import UNSTRUCTURED_LOSS
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.monitor.hardware import peak_flops, resident_gib
from jepa_dist.parallel.world import World
from jepa_dist.plan import StepPlan


def losses(plan: StepPlan, values: dict[str, float], config: Config) -> dict[str, float | None]:
    """Means over the global batch of this step; JEPA's are None while it is off."""
    ce, jepa = values["ce"], values["jepa"]
    if plan.spans is None:
        return {"loss/ce": ce, "loss/jepa": None, "loss/total": ce, "jepa/lambda": 0.0}
    num_spans = max(1, plan.num_span_rows) * config.jepa.spans_per_sequence
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


def mfu(tokens_per_second: float, phase: int, config: Config, world: World) -> dict[str, float]:
    """Share of the devices' peak; nothing where the peak is not known."""
    if world.device.type != "cuda":
        return {}
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    if peak is None:
        return {}
    flops = tokens_per_second * training_flops_per_token(config.model, phase)
    return {"mfu": flops / (peak * world.world_size)}


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
