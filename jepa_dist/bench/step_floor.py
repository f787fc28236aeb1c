"""A training step versus a lower bound, the floor, on random tokens; interleaved rounds.

``trainer`` is the real loop: loader, plan, FSDP2, compiled regions, metrics. ``floor`` is the same
plain model, compiled as one graph (if ``parallel.compile``), in a bare PyTorch loop on one fixed
batch: same recipe, same mixed precision, no FSDP, no trainer, no monitoring, no
communication. The JEPA objective is off (see bench jepa). Under torchrun the floor runs on rank
0 only, on its share of the batch and with all of the optimizer's work. Memory is that of
parameters, optimizer and a step's tensors, without libraries and fragmentation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    with_random_data,
)
from jepa_dist.bench.peak_memory import peak_bytes
from jepa_dist.bench.training import Rounds, steady, train_in_rounds
from jepa_dist.build import build_ema, build_optimizer
from jepa_dist.config import Config
from jepa_dist.data.layout import BatchLayout
from jepa_dist.errors import UserError
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from jepa_dist.monitor.step_timer import TRAINING_PHASES
from jepa_dist.optim.clip import clip_grad_norm
from jepa_dist.parallel.shard import compute_dtype
from jepa_dist.parallel.world import World, start_world, stop_world
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.records import mfu

_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench step``."""
    add_config(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each loop")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps per round")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both loops.

    Raises:
        UserError: an invalid configuration, or a number below 1.
    """
    if arguments.rounds < 1 or arguments.steps < 1:
        raise UserError("bench step: --rounds and --steps must be at least 1")
    chosen = chosen_config(arguments)
    config = chosen.model_copy(update={"jepa": chosen.jepa.model_copy(update={"lambda_": 0.0})})
    config = steady(config, arguments.rounds + 1, arguments.steps)  # the first only warms up
    with tempfile.TemporaryDirectory() as folder:
        world = start_world(config.parallel)
        try:
            measured = measure(with_random_data(config, Path(folder)), world)
        finally:
            stop_world()
    return {"config": str(arguments.config), "changes": arguments.set, **measured}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = []
    for name, loop in result["loops"].items():
        share, memory = loop["mfu"], loop["peak_bytes"]
        rows.append(
            (
                name,
                f"{1e3 * loop['seconds']:,.1f}",
                f"{loop['tokens_per_second']:,.0f}",
                "not known" if share is None else f"{share:.1%}",
                f"{memory / _MIB:,.1f}",
            )
        )
    phases = ", ".join(f"{name} {share:.1%}" for name, share in result["breakdown"].items())
    return "\n".join(
        (
            f"{result['config']} {' '.join(result['changes'])}: {result['tokens_per_step']:,} "
            f"tokens per step on {result['ranks']} rank(s), recurrence phase {result['phase']}; "
            f"median of {result['rounds']} rounds of {result['steps']} steps",
            "",
            markdown_table(("loop", "ms per step", "tokens/s", "MFU", "peak, MiB"), rows),
            "",
            f"time of the trainer / floor: {result['ratio']:.3f} (median over rounds; "
            f"{min(result['ratios']):.3f} to {max(result['ratios']):.3f})",
            f"the trainer's step: {phases}",
        )
    )


def measure(config: Config, world: World) -> dict[str, Any]:
    """Measure the memory of both loops, then their times. Collective.

    Args:
        config: A ``steady`` one; its first round only warms up.
        world: The ranks.

    Returns:
        The result; empty on ranks other than 0.
    """
    trainer = build_trainer(config, world)
    plan = Planner(config, TrainingClock()).plan(0)
    floor = Floor(config, world, plan.phase)
    trainer.step(plan)  # compiles
    floor.step()
    peaks = {
        "trainer": _bytes(trainer.state.tensors().values())
        + peak_bytes(lambda: trainer.step(plan), world.device),
        "floor": _bytes(floor.tensors()) + peak_bytes(floor.step, world.device),
    }
    rounds = train_in_rounds(trainer, floor.step)
    return {} if rounds is None else _result(config, world, plan.phase, rounds, peaks)


def _result(
    config: Config, world: World, phase: int, rounds: Rounds, peaks: Mapping[str, int]
) -> dict[str, Any]:
    tokens = config.batch.sequences * config.model.seq_len
    seconds = {"trainer": rounds.trainer_seconds, "floor": rounds.rival_seconds}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    loops = {}
    flops = tokens * training_flops_per_token(config.model, phase)
    for name, of_each_round in seconds.items():
        median = statistics.median(of_each_round)
        loops[name] = {
            "seconds": median,
            "seconds_of_each_round": of_each_round,
            "tokens_per_second": tokens / median,
            "mfu": mfu(flops / median, world).get("mfu"),
            "peak_bytes": peaks[name],
        }
    return {
        "tokens_per_step": tokens,
        "ranks": world.world_size,
        "phase": phase,
        "rounds": len(ratios),
        "steps": config.train.log_every,
        "loops": loops,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "breakdown": {
            name: statistics.median(r[f"time/{name}"] / r["time/step"] for r in rounds.records)
            for name in (*TRAINING_PHASES, "other")
        },
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this rank's shards."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


# ---------------------------------------------------------------------------- floor


class Floor:
    """The bare loop: float32 master weights, and a copy in the compute dtype if that differs."""

    def __init__(self, config: Config, world: World, phase: int) -> None:
        self._config = config
        self._phase = phase
        self._master = _plain_model(config, torch.float32, world.device)
        dtype = compute_dtype(config.parallel, world.device)
        same = dtype == torch.float32
        self._model = self._master if same else _plain_model(config, dtype, world.device)
        self._forward: Callable[..., Any] = self._model
        if config.parallel.compile:
            self._forward = torch.compile(self._model, dynamic=False)
        parameters = dict(self._master.named_parameters())
        self._optimizer = build_optimizer(config, parameters)
        self._ema = build_ema(config, parameters)
        self._layout = BatchLayout(config.batch.sequences, config.batch.micro, 0, world.world_size)
        shape = (self._layout.micro_size, config.model.seq_len)
        self._tokens_BT, self._targets_BT = (
            torch.randint(config.model.vocab_size, shape, device=world.device) for _ in range(2)
        )
        self._weight_B = torch.ones(self._layout.micro_size, device=world.device)

    def step(self) -> None:
        """Take one optimizer step."""
        if self._model is not self._master:
            with torch.no_grad():
                torch._foreach_copy_(
                    list(self._model.parameters()), list(self._master.parameters())
                )
        batch = self._config.batch.sequences * self._config.model.seq_len
        for _ in range(self._layout.num_micro):
            output = self._forward(
                self._tokens_BT, self._targets_BT, self._weight_B, phase=self._phase
            )
            (output.loss_sum / batch).backward()
        if self._model is not self._master:
            self._cast_gradients()
        clip_grad_norm(self._master.parameters(), self._config.optim.grad_clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.update()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that exist between steps."""
        copy = [] if self._model is self._master else list(self._model.parameters())
        state = self._optimizer.state_tensors() | self._ema.state_tensors()
        return [*self._master.parameters(), *copy, *state.values()]

    def _cast_gradients(self) -> None:
        for master, parameter in zip(
            self._master.parameters(), self._model.parameters(), strict=True
        ):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None


def _plain_model(config: Config, dtype: torch.dtype, device: torch.device) -> GPT:
    """Return an unsharded model on the device, with the run's initial values."""
    with torch.device("meta"):
        model = GPT(config.model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, parameter.shape, config.model, config.seed, device)
            parameter.copy_(value)
    return model.to(dtype)
