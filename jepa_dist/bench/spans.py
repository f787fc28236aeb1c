"""What planning a step costs: span sampling and the broadcast, alone and beside real training.

Alone: rank 0 samples the spans of the whole batch and packs the plan; then one broadcast over gloo
reaches every rank. In training the plan is asked for a step ahead. "Exposed" is the time that the
host spends in asking for it and in waiting for it, the longest of any rank; on CUDA the device
works on meanwhile, so there it is an upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    on_ranks,
    refuse_launcher,
    with_random_data,
)
from jepa_dist.bench.training import steady
from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World, start_world
from jepa_dist.plan import PlanChannel, Planner, StepPlan, TrainingClock
from jepa_dist.training.assemble import build_trainer

_LAMBDA = 0.02
_WARM_UP = 2
_ALONE = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m jepa_dist.bench spans``."""
    add_config(parser)
    parser.add_argument(
        "--sequences", type=int, default=512, help="rows of the global batch (default: 512)"
    )
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of training")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for all of it")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on that many ranks.

    Raises:
        UserError: a configuration that cannot be, a number below 1, or it takes too long.
    """
    refuse_launcher("spans")
    if min(arguments.sequences, arguments.ranks, arguments.steps) < 1:
        raise UserError("bench spans: --sequences, --ranks and --steps must be at least 1")
    config = _with_objective(chosen_config(arguments), arguments.sequences)
    # The last step ends with the run; no record in between, as between two logged steps.
    config = steady(config, 1, _WARM_UP + arguments.steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        config = with_random_data(config, Path(folder))
        ranks = on_ranks(_measure, arguments.ranks, config, timeout=arguments.timeout)
    exposed = [max(of_ranks) for of_ranks in zip(*(r["exposed"] for r in ranks), strict=True)]
    steps = ranks[0]["steps"]
    return {
        "config": str(arguments.config),
        "changes": arguments.set,
        "sequences": arguments.sequences,
        "ranks": arguments.ranks,
        "plan_bytes": ranks[0]["plan_bytes"],
        "sample": ranks[0]["sample"],
        "broadcast": max(rank["broadcast"] for rank in ranks),
        "exposed": statistics.median(exposed),
        "exposed_of_each_step": exposed,
        "step": statistics.median(steps),
        "share": statistics.median(e / s for e, s in zip(exposed, steps, strict=True)),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        ("sample and pack, alone", f"{1e3 * result['sample']:.3f}"),
        ("broadcast and unpack, alone", f"{1e3 * result['broadcast']:.3f}"),
        ("exposed in a training step", f"{1e3 * result['exposed']:.3f}"),
        ("training step", f"{1e3 * result['step']:,.1f}"),
    ]
    return "\n".join(
        (
            f"{result['config']} {' '.join(result['changes'])}: plans of {result['sequences']} "
            f"sequences, {result['plan_bytes']:,} bytes, {result['ranks']} ranks; medians",
            "",
            markdown_table(("", "ms"), rows),
            "",
            f"exposed share of a step: {result['share']:.3%}",
        )
    )


def _with_objective(config: Config, sequences: int) -> Config:
    jepa = {"lambda_": config.jepa.lambda_ or _LAMBDA, "start_frac": 0.0, "ramp_frac": 0.0}
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"sequences": sequences}),
            "jepa": config.jepa.model_copy(update={**jepa, "within_documents": False}),
        }
    )


# ---------------------------------------------------------------------------- on each rank


def _measure(device: torch.device, config: Config) -> dict[str, Any]:
    world = start_world(config.parallel)
    return {**_alone(config, world), **_in_training(config, world)}


def _alone(config: Config, world: World) -> dict[str, Any]:
    """Medians of seconds, with nothing else to do."""
    planner = Planner(config, TrainingClock())
    shape = (config.batch.sequences, config.jepa.spans_per_sequence, 2)
    channel = PlanChannel(config, world, TrainingClock())
    sample, whole = [], []
    for step in range(_ALONE):
        start = time.perf_counter()
        planner.plan(step).pack(shape)
        sample.append(time.perf_counter() - start)
        dist.barrier(group=world.control)
        start = time.perf_counter()
        channel.request(step)
        channel.take()
        whole.append(time.perf_counter() - start)
    return {
        "plan_bytes": planner.plan(0).pack(shape).nbytes,
        "sample": statistics.median(sample),
        # Rank 0 samples first, and everyone waits for that.
        "broadcast": max(0.0, statistics.median(whole) - statistics.median(sample)),
    }


def _in_training(config: Config, world: World) -> dict[str, Any]:
    trainer = build_trainer(config, world)
    channel = _TimedChannel(config, world, trainer.times.clock)
    trainer.segment = replace(trainer.segment, plans=channel)
    trainer.run()
    took = channel.took_of_each_step()
    return {"exposed": [e for e, _ in took[_WARM_UP:]], "steps": [s for _, s in took[_WARM_UP:]]}


class _TimedChannel(PlanChannel):
    """Measures how long its caller is kept."""

    def __init__(self, config: Config, world: World, clock: TrainingClock) -> None:
        super().__init__(config, world, clock)
        self._exposed: list[float] = []
        self._taken_at: list[float] = []
        self._requesting = 0.0

    def request(self, step: int, settle: bool = False) -> None:
        """As the channel's."""
        start = time.perf_counter()
        super().request(step, settle)
        self._requesting = time.perf_counter() - start

    def take(self) -> StepPlan:
        """As the channel's."""
        self._taken_at.append(time.perf_counter())
        plan = super().take()
        self._exposed.append(self._requesting + time.perf_counter() - self._taken_at[-1])
        return plan

    def took_of_each_step(self) -> list[tuple[float, float]]:
        """Seconds exposed, and seconds of the whole step, for all steps but the last."""
        seconds = [after - before for before, after in itertools.pairwise(self._taken_at)]
        return list(zip(self._exposed, seconds, strict=False))
