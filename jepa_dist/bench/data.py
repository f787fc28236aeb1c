"""The data loader: its speed alone, the share of a training step that waits for it, its memory.

It reads windows in random order over many shards of random ids, as in training. Memory is that of
the processes (this one and the loader's), without mapped files, which the kernel may drop. It is
measured half-way and at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jepa_dist.bench.common import add_config, chosen_config, markdown_table
from jepa_dist.bench.training import steady, train_in_rounds
from jepa_dist.build import build_loader
from jepa_dist.config import Config
from jepa_dist.data.order import sample_order
from jepa_dist.data.shards import num_windows, write_shard
from jepa_dist.data.sources import find_split
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World, start_world, stop_world
from jepa_dist.training.assemble import build_trainer

_MIB = 2**20
_STEPS = 3  # per round of training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench data``."""
    add_config(parser)
    parser.add_argument(
        "--shards", type=int, default=1024, help="number of shards (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", type=int, default=64, help="sequences per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes to try"
    )
    parser.add_argument(
        "--batches", type=int, default=2000, help="micro-batches read with each (default: 2000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of training")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader alone, then in training.

    Raises:
        UserError: an invalid configuration, or a number below 1.
    """
    if min(arguments.shards, arguments.windows, arguments.batches, arguments.rounds) < 1:
        raise UserError(
            "bench data: --shards, --windows, --batches and --rounds must be at least 1"
        )
    config = steady(chosen_config(arguments), arguments.rounds + 1, _STEPS)
    with tempfile.TemporaryDirectory() as folder:
        config = _on_shards(config, Path(folder), arguments.shards, arguments.windows)
        world = start_world(config.parallel)
        try:
            alone = [_alone(config, world, n, arguments.batches) for n in arguments.workers]
            waits = _share_of_step(config, world)
        finally:
            stop_world()
    return {
        "config": str(arguments.config),
        "changes": arguments.set,
        "shards": arguments.shards,
        "windows_per_shard": arguments.windows,
        "batches": arguments.batches,
        "rows": config.batch.micro,
        "seq_len": config.model.seq_len,
        "alone": alone,
        "training": {"workers": config.data.workers, **waits},
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = [
        (
            run["workers"],
            f"{run['tokens_per_second']:,.0f}",
            f"{run['shards_read']:,}",
            f"{run['memory_middle'] / _MIB:,.1f}",
            f"{run['memory_end'] / _MIB:,.1f}",
        )
        for run in result["alone"]
    ]
    columns = ("loader processes", "tokens/s", "shards read", "memory half-way, MiB", "at the end")
    training = result["training"]
    return "\n".join(
        (
            f"{result['config']} {' '.join(result['changes'])}: {result['batches']} micro-batches "
            f"of {result['rows']} x {result['seq_len']} tokens from {result['shards']:,} shards",
            "",
            markdown_table(columns, rows),
            "",
            f"a training step ({training['workers']} loader processes) waits for data for "
            f"{training['share']:.2%} of its time ({1e3 * training['data_wait']:.2f} of "
            f"{1e3 * training['step']:.1f} ms, medians)",
        )
    )


def _on_shards(config: Config, folder: Path, shards: int, windows: int) -> Config:
    """Return the configuration on this many shards, for training and validation."""
    model = config.model
    generator = np.random.Generator(np.random.PCG64(config.seed))
    ids = generator.integers(0, model.vocab_size, windows * model.seq_len + 1)
    for index in range(shards):
        write_shard(folder / f"tokens_{index:06d}.bin", np.roll(ids, index), model.vocab_size)
    data: dict[str, Any] = {
        "train": f"{folder}/*.bin",
        "val": f"{folder}/tokens_000000.bin",
        "stages": [],
        "tokenizer": None,
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "run": config.run.model_copy(update={"dir": str(folder / "run")}),
        }
    )


# ---------------------------------------------------------------------------- loader alone


def _alone(config: Config, world: World, workers: int, batches: int) -> dict[str, Any]:
    """Measure reading this many micro-batches, without using them."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    with build_loader(config, world, 0) as loader:
        next(loader)  # processes have started
        start = time.perf_counter()
        _drop(loader, batches // 2)
        middle = _own_memory()
        _drop(loader, batches - batches // 2)
        seconds = time.perf_counter() - start
        end = _own_memory()
    tokens = batches * config.batch.micro * config.model.seq_len
    return {
        "workers": workers,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "shards_read": _shards_read(config, batches),
        "memory_middle": middle,
        "memory_end": end,
    }


def _drop(loader: Iterator[object], count: int) -> None:
    for _ in range(count):
        next(loader)


def _own_memory() -> int:
    """Return the memory in bytes of this process and its children, without mapped files."""
    here = psutil.Process()
    infos = [process.memory_info() for process in (here, *here.children(recursive=True))]
    return sum(info.rss - info.shared for info in infos)


def _shards_read(config: Config, batches: int) -> int:
    """Return the number of shards that the windows of this many micro-batches are in."""
    shards = find_split(config, "train")
    tokens = (shards[0].stat().st_size - 1024) // 2
    windows = num_windows(tokens, config.model.seq_len)
    count = batches * config.batch.micro
    ids = sample_order(0, count, windows * len(shards), config.seed)
    return len(np.unique(ids // windows))


# ---------------------------------------------------------------------------- in training


def _share_of_step(config: Config, world: World) -> dict[str, float]:
    """Measure how long the trainer's step waits for its batches; medians over rounds."""
    rounds = train_in_rounds(build_trainer(config, world))
    if rounds is None:
        return {}
    waits = [record["time/data_wait"] for record in rounds.records]
    steps = [record["time/step"] for record in rounds.records]
    shares = [wait / step for wait, step in zip(waits, steps, strict=True)]
    return {
        "data_wait": statistics.median(waits),
        "step": statistics.median(steps),
        "share": statistics.median(shares),
    }
