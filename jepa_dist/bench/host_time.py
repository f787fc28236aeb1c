"""Host time of a training step: the cost of Python and the dispatcher, independent of the device.

The configuration keeps its structure (blocks, loops, skips, parameter groups), but is so narrow and
short that computation takes almost no time. The rest is the host's work, for which a GPU waits if
kernels are short. Each rank trains with the trainer's own loop.

Times are CPU seconds of the training thread (without waiting for other ranks): the minimum over the
steps that log nothing, since other load on the machine only adds to it. Operators are counted by
torch.profiler in one such step: ``calls`` are those called from Python or from autograd (a
``_foreach_`` operator is one), ``launches`` those of them that compute (no views, no allocations):
on CUDA at least one kernel or copy each. Kernels of compiled regions are not included. A pause is
one run of Python's garbage collector.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

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
from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer

_PHASES = ("forward", "backward", "optimizer")
_COUNTS = ("calls", "launches")
_LOG_EVERY = 10
_WARM_UP = 1  # rounds of that many steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    add_config(parser, "configs/gpt_36m.yaml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    parser.add_argument("--rounds", type=int, default=3, help=f"rounds of {_LOG_EVERY} steps")
    parser.add_argument(
        "--timeout", type=float, default=1200.0, help="time limit of the ranks in seconds"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on each number of ranks.

    Raises:
        UserError: an invalid configuration, or the ranks take too long.
    """
    refuse_launcher("host")
    config = chosen_config(arguments)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            toy = with_random_data(narrowed(config, ranks), Path(folder))
            toy = steady(toy, _WARM_UP + arguments.rounds, _LOG_EVERY)
            of_ranks = on_ranks(measure, ranks, toy, timeout=arguments.timeout)
            found[str(ranks)] = of_ranks[0]
    return {"config": str(arguments.config), "ranks": found}


def narrowed(config: Config, ranks: int) -> Config:
    """Return the configuration reduced to its structure: narrow, short, one sequence per rank, all
    loops from the first step, no JEPA."""
    heads = config.model.num_heads // config.model.num_kv_heads
    head_width = config.model.rope_dims or 8
    model = config.model.model_copy(
        update={
            "vocab_size": 256,
            "seq_len": 16,
            "num_heads": heads,
            "num_kv_heads": 1,
            "model_dim": heads * head_width,
            "mlp_mult": 1.0,
        }
    )
    train = {"enable_looping_at": 0.0, "loop_phase2_at": 0.0}
    return config.model_copy(
        update={
            "model": model,
            "batch": config.batch.model_copy(update={"sequences": ranks, "micro": 1}),
            "train": config.train.model_copy(update=train),
            "jepa": config.jepa.model_copy(update={"lambda_": 0.0}),
        }
    )


def measure(device: torch.device, config: Config) -> dict[str, Any]:
    """Train on one rank, and return what the host did."""
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    meter = _HostMeter(device)
    trainer = build_trainer(config, start_world(config.parallel), meter=meter)
    stop_at = config.train.stop_at
    assert stop_at is not None
    operators = _Operators(stop_at - 2)
    with _pauses(meter) as pauses:
        trainer.run(profiler=operators)
    first, last = _WARM_UP * config.train.log_every, stop_at - 2
    steps = [step for step in meter.steps[first:last] if not step.logs]
    phases = {name: min(step.phases[name] for step in steps) for name in _PHASES}
    total = min(step.seconds for step in steps)
    kept = [seconds for step, seconds in pauses if first <= step < last]
    return {
        "ms_per_step": 1e3 * total,
        "ms": {name: 1e3 * seconds for name, seconds in phases.items()}
        | {"other": 1e3 * (total - sum(phases.values()))},
        "median_ms_per_step": 1e3 * statistics.median(step.seconds for step in steps),
        "steps": last - first,
        "calls": operators.calls,
        "launches": operators.launches,
        "names": operators.names,
        "pauses": len(kept),
        "longest_pause_ms": 1e3 * max(kept, default=0.0),
        "full_collection_ms": 1e3 * _seconds(gc.collect),
    }


# ---------------------------------------------------------------------------- time


@dataclass
class _Step:
    logs: bool = False
    seconds: float = 0.0
    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class _HostMeter(StepTimer):
    """A step timer that also measures the CPU seconds of this thread, by step and phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(1, device)
        self._began = time.thread_time()
        self.steps: list[_Step] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        with super().phase(name):
            yield
        if self.steps:
            self.steps[-1].phases[name] += time.thread_time() - began

    def step(self, step: int, *, saving: bool = False, times_communication: bool = False) -> None:
        now = time.thread_time()
        if self.steps:
            self.steps[-1].seconds = now - self._began
        self._began = now
        self.steps.append(_Step(logs=times_communication))
        super().step(step, saving=saving, times_communication=times_communication)


# ---------------------------------------------------------------------------- operators


class _Operators:
    """A profiler for the trainer that counts the operators of one step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._profile: profile | None = None
        self._steps = 0
        self.calls: dict[str, int] = {}
        self.launches: dict[str, int] = {}
        self.names: dict[str, dict[str, int]] = {}

    def step(self) -> None:
        """Begin a step."""
        if self._steps == self._step:
            self._profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)
            self._profile.start()
        elif self._profile is not None:
            done, self._profile = self._profile, None
            done.stop()
            self._count(done.events() or [])
        self._steps += 1

    def _count(self, events: list[FunctionEvent]) -> None:
        ranges = [event for event in events if event.name in _PHASES]
        calls: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        names: dict[str, Counter[str]] = {name: Counter() for name in (*_PHASES, "other")}
        for event in events:
            if not _is_operator(event) or _has_operator_above(event):
                continue
            phase = next((r.name for r in ranges if _lies_within(event, r)), "other")
            calls[phase] += 1
            launches[phase] += _computes(event)
            names[phase][event.name] += 1
        self.calls, self.launches = dict(calls), dict(launches)
        self.names = {phase: dict(counts.most_common()) for phase, counts in names.items()}


def _is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith(("aten::", "c10d::", "fsdp::"))


def _has_operator_above(event: FunctionEvent) -> bool:
    above = event.cpu_parent
    while above is not None:
        if _is_operator(above):
            return True
        above = above.cpu_parent
    return False


def _lies_within(event: FunctionEvent, around: FunctionEvent) -> bool:
    return around.time_range.start <= event.time_range.start <= around.time_range.end


def _computes(event: FunctionEvent) -> bool:
    """Return whether the operator, or one that it calls, does more than view or allocate."""
    below = [child for child in event.cpu_children if _is_operator(child)]
    if below and not event.name.startswith("aten::_foreach"):
        return any(_computes(child) for child in below)
    return not _describes(event.name)


@functools.cache
def _describes(name: str) -> bool:
    """Return whether an operator only allocates or returns a view, by its schema."""
    short = name.split("::")[1]
    if short.startswith(("empty", "new_empty", "resize", "set_", "detach", "lift_fresh", "is_")):
        return True
    if short in ("to", "contiguous", "reshape", "result_type", "item", "_local_scalar_dense"):
        return True  # without an operator below it, nothing was copied
    schemas = torch._C._jit_get_schemas_for_operator(name)
    returns = [schema.returns[0].alias_info for schema in schemas if schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


# ---------------------------------------------------------------------------- pauses


@contextmanager
def _pauses(meter: _HostMeter) -> Iterator[list[tuple[int, float]]]:
    """Record every run of the garbage collector in this context: its step and CPU seconds."""
    pauses: list[tuple[int, float]] = []
    began = 0.0

    def observe(phase: str, _: Mapping[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            pauses.append((len(meter.steps) - 1, time.thread_time() - began))

    gc.callbacks.append(observe)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(observe)


def _seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


# ---------------------------------------------------------------------------- output


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown: a row for each number of ranks and phase."""
    columns = ["ranks", "phase", "host ms per step", "operators called", "of them launches"]
    rows: list[list[object]] = []
    pauses = []
    for ranks, found in result["ranks"].items():
        sums = [f"{found['ms_per_step']:.1f}", *(sum(found[k].values()) for k in _COUNTS)]
        rows.append([ranks, "all", *sums])
        for phase, milliseconds in found["ms"].items():
            counts = [found[kind].get(phase, 0) for kind in _COUNTS]
            rows.append([ranks, phase, f"{milliseconds:.1f}", *counts])
        pauses.append(
            f"{ranks} rank(s): {found['pauses']} garbage collections in {found['steps']} steps, "
            f"the longest {found['longest_pause_ms']:.1f} ms; a full one over all objects, as "
            f"automatic collection starts now and then: {found['full_collection_ms']:.1f} ms"
        )
    return "\n".join([markdown_table(columns, rows), "", *pauses])
