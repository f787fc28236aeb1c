"""Collectives and bytes of one training step, counted on real ranks, and their lower bounds.

Each setting is a change of one configuration; ``Trainer.step`` runs eagerly on as many ranks as the
setting needs, and every collective is counted at its launch. "Minimum" is computed from the model's
shapes only, by the given formula, for what a rank may keep in this setting: a unit that is freed
after its forward must be gathered again. Symbols: N units besides the root (blocks, unless
``parallel.blocks_per_unit`` is more than 1), K of them looped and kept gathered, E executions of
units in a pass, M micro-batches, P parameters (P_root, P_last: those of
the root and of the last block), S elements of Muon's matrices, W ranks, w ranks per replica,
b bytes per element of the compute dtype; gradients are reduced in float32.

Bytes are those sent by a rank per step, counted as in ``jepa_dist.bench.collectives``; the count
exceeds the minimum by the padding of parameters that the ranks do not divide, and by some hundred
bytes of scalars.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jepa_dist.bench.collectives import CollectiveCounter
from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    on_ranks,
    refuse_launcher,
    with_random_data,
)
from jepa_dist.config import Config
from jepa_dist.data.layout import BatchLayout
from jepa_dist.model.execution import LAST_PHASE, execution_order, looped_blocks
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.joint import JointModel
from jepa_dist.objectives.registry import objective_class
from jepa_dist.optim.exchange import MAX_WAVES
from jepa_dist.optim.groups import group_parameters
from jepa_dist.parallel.shard import compute_dtype, fsdp_units
from jepa_dist.parallel.world import start_world
from jepa_dist.plan import sample_shape
from jepa_dist.training.assemble import build_trainer

_GRADIENT_BYTES = 4  # gradients are reduced in float32

# ---------------------------------------------------------------------------- minimum


@dataclass(frozen=True)
class Minimum:
    """Lower bound for one kind of collective, per step and rank."""

    launches: int
    launches_formula: str
    bytes: float
    bytes_formula: str


@dataclass(frozen=True)
class Shapes:
    """Elements of the units that are gathered one at a time."""

    root: int
    units: dict[int, int]
    """Elements of the units besides the root's, by their last block."""
    muon: tuple[int, ...]
    """Elements of each matrix that Muon updates."""

    @property
    def all(self) -> int:
        """Elements of all parameters."""
        return self.root + sum(self.units.values())


def shapes_of(config: Config) -> Shapes:
    """Return the sizes of the configuration's model and objective."""
    with torch.device("meta"):
        root = JointModel(GPT(config.model), objective_class(config)(config, None))
    blocks = [sum(p.numel() for p in block.parameters()) for block in root.model.blocks]
    indices = fsdp_units(
        range(len(blocks)), looped_blocks(config.model), config.parallel.blocks_per_unit
    )
    units = {unit[-1]: sum(blocks[index] for index in unit) for unit in indices}
    named = root.trained_parameters()
    everything = sum(p.numel() for p in named.values())
    groups = group_parameters(named.items(), config.optim, config.model.tie_embeddings)
    muon = [p.numel() for g in groups if g.kind == "muon" for p in g.parameters.values()]
    return Shapes(everything - sum(units.values()), units, tuple(muon))


def minimum(config: Config, ranks: int, phase: int, device: torch.device) -> dict[str, Minimum]:
    """Return the lower bounds of a step, by kind of collective."""
    shapes = shapes_of(config)
    replicas = config.parallel.dp_replicate
    shards = ranks // replicas
    found = {"broadcast": _plan(config)} if ranks > 1 else {}
    if shards > 1:
        element = compute_dtype(config.parallel, device).itemsize
        micro_batches = _micro_batches(config, ranks)
        found["all_gather"] = _gathers(config, shapes, micro_batches, phase, element)
        found["reduce_scatter"] = _reductions(config, shapes, micro_batches)
    if ranks > 1:
        found["all_reduce"] = _all_reductions(shapes, shards, replicas)
        if shapes.muon:
            found["all_to_all"] = _muon(config, shapes, shards, replicas, device)
    return found


def _micro_batches(config: Config, ranks: int) -> int:
    return BatchLayout(config.batch.sequences, config.batch.micro, 0, ranks).num_micro


def _plan(config: Config) -> Minimum:
    """Return the bound of rank 0's plan: at least the samples of all sequences."""
    return Minimum(1, "1 plan", 8 * math.prod(sample_shape(config) or (0,)), "8 per sample")


def _gathers(
    config: Config, shapes: Shapes, micro_batches: int, phase: int, element: int
) -> Minimum:
    """Return the bound of gathers: each kept unit once, others per execution, both passes."""
    order = execution_order(config.model, phase)
    executions = Counter(e.block for e in (*order.encoder, *order.decoder))
    looped = looped_blocks(config.model) if config.parallel.keep_looped_gathered else range(0)
    times = micro_batches if config.parallel.accumulate == "sharded" else 1
    accumulates = micro_batches > 1 and times == 1
    last = config.model.num_layers - 1
    launches, elements = times, times * shapes.root
    for index, size in shapes.units.items():
        if index in looped and not accumulates:
            needed = 1
        elif accumulates or not config.parallel.reshard_after_forward:
            needed = times
        else:
            needed = times * executions[index] * (1 if index == last else 2)
        launches += needed
        elements += needed * size
    per_micro = "M" if times > 1 else ""
    if accumulates or not (config.parallel.reshard_after_forward and shapes.units):
        return Minimum(
            launches,
            f"{per_micro}(1 + N)" if per_micro else "1 + N",
            elements * element,
            f"{per_micro}bP",
        )
    if looped:
        return Minimum(
            launches,
            f"{per_micro}(1 + 2(N - K) - 1) + K" if per_micro else "1 + 2(N - K) - 1 + K",
            elements * element,
            "b(2P - P_root - P_last - P_kept)" if times == 1 else "each unit as often",
        )
    if phase > 0 and config.model.num_loops:
        return Minimum(launches, "1 + 2E - 1", elements * element, "each unit as often")
    return Minimum(
        launches,
        f"{per_micro}(1 + 2N - 1)" if per_micro else "1 + 2N - 1",
        elements * element,
        f"{per_micro}b(2P - P_root - P_last)",
    )


def _reductions(config: Config, shapes: Shapes, micro_batches: int) -> Minimum:
    """Return the bound of reductions: each unit's gradient once, or once per micro-batch."""
    times = micro_batches if config.parallel.accumulate == "sharded" else 1
    per_micro = "M" if times > 1 else ""
    return Minimum(
        times * (1 + len(shapes.units)),
        f"{per_micro}(1 + N)" if per_micro else "1 + N",
        times * _GRADIENT_BYTES * shapes.all,
        f"{per_micro}4P",
    )


def _all_reductions(shapes: Shapes, shards: int, replicas: int) -> Minimum:
    """Return the bound of the gradient norm (no sum over replicas), metrics, and replicas."""
    norm = int(shards > 1)
    launches, launches_formula = norm + 1, "1 norm + 1 metrics" if norm else "1 metrics"
    if replicas == 1:
        return Minimum(launches, launches_formula, 0, "scalars only")
    return Minimum(
        launches + 1 + len(shapes.units),
        f"1 + N + {launches_formula}",
        2 * _GRADIENT_BYTES * shapes.all / shards,
        "8P/w",
    )


def _muon(
    config: Config, shapes: Shapes, shards: int, replicas: int, device: torch.device
) -> Minimum:
    """Return the bound of Muon: matrices to their owners and back, in overlapping waves."""
    dtypes = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    size = sum(shapes.muon) * dtypes[config.optim.muon_dtype].itemsize
    return Minimum(
        2 * min(MAX_WAVES, -(-len(shapes.muon) // (shards * replicas))),
        f"2 x waves (at most {MAX_WAVES})",
        size / (shards * replicas) + size / shards,
        "S bytes (1/W + 1/w)",
    )


# ---------------------------------------------------------------------------- settings


_Changes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A change of the configuration, and the ranks and phase to count it on."""

    ranks: int
    changes: _Changes
    phase: int = 0


_PLAIN: _Changes = {
    "jepa": {"lambda_": 0.0},
    "optim": {"matrix": "adamw"},
    "parallel": {
        "compile": False,
        "blocks_per_unit": 1,
        "reshard_after_forward": True,
        "keep_looped_gathered": True,
        "accumulate": "gathered",
        "dp_replicate": 1,
        "dp_shard": -1,
    },
    "train": {"enable_looping_at": 0.0, "loop_phase2_at": 0.0, "log_every": 1000},
    "data": {"workers": 0},
    "monitor": {"jepa_every": 0},
}
_WITHOUT_LOOPS: _Changes = {"model": {"num_loops": 0, "untie_loop_mlps": False}}


def settings(config: Config) -> dict[str, Setting]:
    """Return all settings; each differs from ``plain`` in what its name says."""
    most = config.batch.sequences // 2
    found = {
        "plain": Setting(2, {}),
        "kept after forward": Setting(2, {"parallel": {"reshard_after_forward": False}}),
        "units of two": Setting(2, {"parallel": {"blocks_per_unit": 2}}),
        "one unit": Setting(2, {"parallel": {"blocks_per_unit": config.model.num_layers}}),
        "HSDP": Setting(4, {"parallel": {"dp_replicate": 2}}),
        "replication": Setting(2, {"parallel": {"dp_replicate": 2}}),
        "accumulation": Setting(2, {"batch": {"micro": -(-most // 4)}}),
        "accumulation, sharded": Setting(
            2, {"batch": {"micro": -(-most // 4)}, "parallel": {"accumulate": "sharded"}}
        ),
        "Muon": Setting(2, {"optim": {"matrix": "muon"}}),
        "JEPA": Setting(2, {"jepa": {"lambda_": 0.02}}),
        "next state": Setting(2, {"jepa": {"lambda_": 0.02, "objective": "next_state"}}),
        "next latent": Setting(2, {"jepa": {"lambda_": 0.02, "objective": "next_latent"}}),
    }
    if config.model.num_loops:
        found["looped"] = Setting(2, {}, LAST_PHASE)
        again = {"parallel": {"keep_looped_gathered": False}}
        found["looped, gathered again"] = Setting(2, again, LAST_PHASE)
        pairs = {"parallel": {"blocks_per_unit": 2}}
        found["looped, units of two"] = Setting(2, pairs, LAST_PHASE)
    return found


def configured(config: Config, setting: Setting) -> Config:
    """Return the configuration with the setting's changes, eager, in its phase from step 0."""
    one_micro_batch: _Changes = {"batch": {"micro": config.batch.sequences}}
    for changes in (
        _PLAIN,
        one_micro_batch,
        {} if setting.phase else _WITHOUT_LOOPS,
        setting.changes,
    ):
        config = config.model_copy(
            update={
                section: getattr(config, section).model_copy(update=dict(values))
                for section, values in changes.items()
            }
        )
    return config


# ---------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench comm``."""
    add_config(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="time limit in seconds for the ranks of a setting",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count every setting.

    Raises:
        UserError: an invalid configuration, a timeout, or too few CUDA devices.
    """
    refuse_launcher("comm")
    config = chosen_config(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = settings(config)
    counted = count(config, wanted, arguments.timeout)
    rows = {}
    for name, setting in wanted.items():
        changed = configured(config, setting)
        must = minimum(changed, setting.ranks, setting.phase, device)
        rows[name] = {
            "ranks": setting.ranks,
            "micro_batches": _micro_batches(changed, setting.ranks),
            **counted[name],
            "minimum": {kind: asdict(value) for kind, value in must.items()},
        }
    shapes = shapes_of(config)
    return {
        "config": str(arguments.config),
        "blocks": config.model.num_layers,
        "parameters": shapes.all,
        "compute_bytes": compute_dtype(config.parallel, device).itemsize,
        "settings": rows,
    }


def count(
    config: Config, wanted: Mapping[str, Setting], timeout: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Return launches (rank 0) and bytes (mean over ranks) of a step, by setting and kind."""
    counted = {}
    with tempfile.TemporaryDirectory() as folder:
        config = with_random_data(config, Path(folder))
        for ranks in sorted({setting.ranks for setting in wanted.values()}):
            of_ranks = on_ranks(count_steps, ranks, config, dict(wanted), timeout=timeout)
            for name, first in of_ranks[0].items():
                counted[name] = first | {
                    "bytes": {
                        kind: sum(of_rank[name]["bytes"][kind] for of_rank in of_ranks) / ranks
                        for kind in first["bytes"]
                    }
                }
    return counted


def count_steps(
    device: torch.device, config: Config, wanted: Mapping[str, Setting]
) -> dict[str, Any]:
    """Count the settings of this number of ranks; on one rank."""
    ranks = dist.get_world_size()
    return {
        name: _count_step(configured(config, setting), setting.phase)
        for name, setting in wanted.items()
        if setting.ranks == ranks
    }


def _count_step(config: Config, phase: int) -> dict[str, dict[str, int]]:
    """Return the collectives of the second step; in the first, Muon also compares gradients."""
    trainer = build_trainer(config, start_world(config.parallel))
    plans = trainer.segment.plans
    plans.request(0)
    trainer.step(plans.take())
    with CollectiveCounter() as counter:
        plans.request(1)
        plan = plans.take()
        trainer.step(plan)
    trainer.segment.reduction.drain()
    if plan.phase != phase:
        raise RuntimeError(f"counted phase {plan.phase} instead of {phase}")
    return {"launches": dict(counter.counts), "bytes": dict(counter.bytes)}


_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown; each cell has the count, the minimum and its formula."""
    columns = ["setting", "ranks", *(f"{kind}: launches / minimum" for kind in _KINDS)]
    columns += ["MB per rank / minimum", "formula of all_gather, reduce_scatter, others"]
    rows = []
    for name, setting in result["settings"].items():
        must, micro = setting["minimum"], setting["micro_batches"]
        cells: list[object] = [name if micro == 1 else f"{name} (M = {micro})", setting["ranks"]]
        for kind in _KINDS:
            counted = setting["launches"].get(kind, 0)
            formula = f" = {must[kind]['launches_formula']}" if kind in must else ""
            cells.append(f"{counted} / {must[kind]['launches'] if kind in must else 0}{formula}")
        counted, least = sum(setting["bytes"].values()), sum(m["bytes"] for m in must.values())
        cells.append(f"{counted / 1e6:.2f} / {least / 1e6:.2f}")
        cells.append("; ".join(must[kind]["bytes_formula"] for kind in _KINDS if kind in must))
        rows.append(cells)
    caption = (
        f"{result['config']}: N = {result['blocks']} in units of one block, "
        f"P = {result['parameters']:,}, b = {result['compute_bytes']}; one step"
    )
    return f"{caption}\n\n{markdown_table(columns, rows)}"
