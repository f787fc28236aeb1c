"""Overhead of monitoring: the same training with monitoring on and off, interleaved.

``on`` is a run as with ``jepa_dist.train``: records every ``train.log_every`` steps on the console,
in metrics.jsonl and in TensorBoard, objective diagnostics every ``monitor.jepa_every`` steps,
straggler detection, watchdog, profiler available. ``off`` has none of these. Both run in one
process and take turns of a fixed number of steps. Processor time counts all threads; it is less
noisy on a shared machine.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    refuse_launcher,
    synchronize,
    with_random_data,
)
from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.monitor.reporter import Reporter
from jepa_dist.monitor.run_dir import write_run_dir
from jepa_dist.monitor.watchdog import Watchdog
from jepa_dist.parallel.world import World, start_world, stop_world
from jepa_dist.training.assemble import build_trainer

_NEVER = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench monitor``."""
    add_config(parser)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each run")
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps per turn (0: monitor.jepa_every)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both runs.

    Raises:
        UserError: an invalid configuration, or a number that is too low.
    """
    refuse_launcher("monitor")
    chosen = chosen_config(arguments)
    steps = arguments.steps or max(chosen.monitor.jepa_every, chosen.train.log_every)
    if arguments.rounds < 1 or steps < 1:
        raise UserError("bench monitor: --rounds and --steps must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        config = with_random_data(chosen, Path(folder))
        world = start_world(config.parallel)
        try:
            turns = _measure(config, world, arguments.rounds, steps, Path(folder))
        finally:
            stop_world()
    return {
        "config": str(arguments.config),
        "changes": arguments.set,
        "tokens_per_step": config.batch.sequences * config.model.seq_len,
        "log_every": config.train.log_every,
        "jepa_every": config.monitor.jepa_every,
        "rounds": arguments.rounds,
        "steps": steps,
        **{clock: _compare(turns, clock) for clock in ("wall", "processor")},
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = []
    for clock in ("wall", "processor"):
        times = result[clock]
        spread = f"{min(times['ratios']):.3f} to {max(times['ratios']):.3f}"
        milliseconds = (f"{1e3 * times[name]:.2f}" for name in ("on", "off"))
        rows.append((clock, *milliseconds, f"{times['ratio']:.4f}", spread))
    head = (
        f"{result['config']} {' '.join(result['changes'])}: {result['tokens_per_step']:,} tokens "
        f"per step; records every {result['log_every']} steps, objective diagnostics every "
        f"{result['jepa_every']}; median of {result['rounds']} turns of {result['steps']} steps"
    )
    columns = ("time", "on, ms per step", "off", "on / off", "of each turn")
    return f"{head}\n\n{markdown_table(columns, rows)}"


class _Turns:
    """A profiler hook that times the turns of one run, and blocks it between them."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps = steps
        self._device = device
        self._count = 0
        self._began = (0.0, 0.0)
        self.next: _Turns | None = None
        self.go = threading.Event()
        self.taken: list[tuple[float, float]] = []

    def step(self) -> None:
        """Begin a step; the first turn, which compiles, is dropped."""
        if self._count % self._steps == 0:
            synchronize(self._device)
            now = (time.perf_counter(), time.process_time())
            if self._count > self._steps:
                wall, processor = (b - a for a, b in zip(self._began, now, strict=True))
                self.taken.append((wall / self._steps, processor / self._steps))
            self._end_turn()
            self._began = (time.perf_counter(), time.process_time())
        self._count += 1

    def _end_turn(self) -> None:
        assert self.next is not None
        self.go.clear()
        self.next.go.set()
        self.go.wait()


def _measure(
    config: Config, world: World, rounds: int, steps: int, folder: Path
) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) seconds per step of every turn, by name."""
    turns = {name: _Turns(steps, world.device) for name in ("on", "off")}
    turns["on"].next, turns["off"].next = turns["off"], turns["on"]
    # The first turn is warm-up; a turn's time is known when the next one begins.
    length = (rounds + 2) * steps + 1
    runs = {"on": _stopped_at(config, length), "off": _quiet(_stopped_at(config, length))}
    failures: list[BaseException] = []

    def train(name: str) -> None:
        try:
            if world.device.type == "cuda":
                torch.cuda.set_device(world.device)
            _train(runs[name], world, turns[name], folder / name, monitored=name == "on")
        except BaseException as failure:
            failures.append(failure)
        finally:
            turn = turns[name].next
            assert turn is not None
            turn.go.set()

    with redirect_stdout(io.StringIO()):
        threads = [threading.Thread(target=train, args=(name,)) for name in turns]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return {name: turn.taken[:rounds] for name, turn in turns.items()}


def _train(config: Config, world: World, turns: _Turns, run_dir: Path, *, monitored: bool) -> None:
    trainer = build_trainer(config, world)
    if not monitored:
        trainer.run(profiler=turns)
        return
    write_run_dir(run_dir, {})
    late = config.monitor.late_seconds
    with Watchdog(run_dir, world.rank, world.world_size, lambda: trainer.times.meter.place, late):
        trainer.run(Reporter(run_dir, config), turns)


def _stopped_at(config: Config, steps: int) -> Config:
    """Return the configuration without evaluation, with schedules that stay at their start."""
    changes: dict[str, Any] = {"steps": _NEVER, "stop_at": steps, "max_wallclock_seconds": None}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=changes),
            "eval": config.eval.model_copy(update={"every": 0}),
        }
    )


def _quiet(config: Config) -> Config:
    """Return the configuration without monitoring."""
    unmonitored = {"jepa_every": 0, "straggler_ratio": 0.0}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"log_every": _NEVER}),
            "monitor": config.monitor.model_copy(update=unmonitored),
        }
    )


def _compare(turns: Mapping[str, list[tuple[float, float]]], clock: str) -> dict[str, Any]:
    """Return medians over turns, and the ratios of consecutive turns."""
    place = ("wall", "processor").index(clock)
    on, off = ([turn[place] for turn in turns[name]] for name in ("on", "off"))
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    return {
        "on": statistics.median(on),
        "off": statistics.median(off),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
