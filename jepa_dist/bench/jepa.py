"""Cost of the JEPA objective: the same training step with it on, off, and without its code.

Rounds of all variants alternate on one model. ``absent`` trains only on cross-entropy, without the
code of objectives; ``off`` is the trainer before the objective starts; ``on`` samples, taps states
and adds the loss, by ``jepa.objective`` and its settings. "New graphs" is the number of graphs that
a variant compiled beyond those of earlier ones, in this order: 0 means that it reuses theirs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    time_interleaved,
    with_random_data,
)
from jepa_dist.bench.training import steady, stepper, with_objective
from jepa_dist.data.loader import Batch
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.plan import StepPlan
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.loop import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench jepa``."""
    add_config(parser)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each variant")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per round")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants.

    Raises:
        UserError: an invalid configuration, or a number below 1.
    """
    if arguments.rounds < 1 or arguments.steps < 1:
        raise UserError("bench jepa: --rounds and --steps must be at least 1")
    config = steady(chosen_config(arguments), arguments.rounds, arguments.steps)
    config = with_objective(config, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        world = start_world(config.parallel)
        trainer = build_trainer(with_random_data(config, Path(folder)), world)
        try:
            measured = measure(variants(trainer), arguments.rounds, arguments.steps, world.device)
        finally:
            trainer.segment.batches.close()
            stop_world()
    return {
        "config": str(arguments.config),
        "changes": arguments.set,
        "tokens_per_step": config.batch.sequences * config.model.seq_len,
        "ranks": world.world_size,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        **measured,
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = [
        (
            name,
            f"{1e3 * variant['seconds']:.1f}",
            f"{variant['ratio_to_off']:.3f}",
            f"{min(variant['ratios_to_off']):.3f} to {max(variant['ratios_to_off']):.3f}",
            variant["new_graphs"],
        )
        for name, variant in result["variants"].items()
    ]
    head = (
        f"{result['config']} {' '.join(result['changes'])}: {result['tokens_per_step']:,} tokens "
        f"per step on {result['ranks']} rank(s); median of {result['rounds']} rounds of "
        f"{result['steps']} steps, ratio to the same round of ``off``"
    )
    columns = ("objective", "ms per step", "ratio to off", "of each round", "new graphs")
    return f"{head}\n\n{markdown_table(columns, rows)}"


def measure(
    step_of: Mapping[str, Callable[[], None]], rounds: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time alternating rounds of steps of each variant; count the graphs that each compiles."""
    new_graphs = {name: _graphs_of(step) for name, step in step_of.items()}
    seconds = time_interleaved(
        {name: functools.partial(_repeat, step, steps) for name, step in step_of.items()},
        rounds,
        device,
    )
    result = {}
    for name, of_each_round in seconds.items():
        ratios = [a / b for a, b in zip(of_each_round, seconds["off"], strict=True)]
        result[name] = {
            "seconds": statistics.median(of_each_round) / steps,
            "seconds_of_each_round": of_each_round,
            "ratio_to_off": statistics.median(ratios),
            "ratios_to_off": ratios,
            "new_graphs": new_graphs[name],
        }
    return {"variants": result}


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _graphs_of(step: Callable[[], None]) -> int:
    """Return how many graphs two steps compile (the second one may recompile)."""
    before = _compiled_graphs()
    _repeat(step, 2)
    return _compiled_graphs() - before


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------- variants


def variants(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """Return a step of each variant, on the same model, optimizer and data."""
    off, on = with_objective(trainer.config, 1.0), with_objective(trainer.config, 0.0)
    return {
        "absent": stepper(trainer, off, functools.partial(_loss_without_jepa, trainer)),
        "off": stepper(trainer, off),
        "on": stepper(trainer, on),
    }


def _loss_without_jepa(
    trainer: Trainer, batch: Batch, plan: StepPlan, index: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute ``GlobalLoss`` as if there were no objective."""
    output = trainer.state.root(batch.tokens, batch.targets, batch.weight, phase=plan.phase)
    ce = output.loss_sum / (trainer.config.batch.sequences * batch.targets.size(1))
    return ce, {"ce": ce}
