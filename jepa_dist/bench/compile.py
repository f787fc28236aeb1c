"""Compilation: cold and warm starts, graphs and cost by depth, and what ranks of a host share.

Each start is a process of its own that builds the trainer of a configuration with so many layers
and runs its warm-up (every graph of the run: phases, JEPA, evaluation) twice. What the first one
takes longer than the second is the time of compilation. "Cold" starts with an empty cache folder,
"warm" with the one that the cold start left. CPU seconds are those of the process and of the
compiler's workers during the first warm-up. Compiled are the cache's misses, reused its hits;
forward and backward count as two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch._dynamo

from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    on_ranks,
    refuse_launcher,
    synchronize,
    with_random_data,
)
from jepa_dist.config import Config
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.loop import Trainer

# ---------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m jepa_dist.bench compile``."""
    add_config(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 32])
    parser.add_argument(
        "--ranks", type=int, default=2, help="of a further cold start at the first depth; 1: none"
    )
    parser.add_argument("--rounds", type=int, default=1, help="starts of each kind, in turn")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds until a start is ended"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start cold and warm at every depth, in turn.

    Raises:
        UserError: the configuration cannot be, or a start takes too long.
    """
    refuse_launcher("compile")
    config = chosen_config(arguments)
    starts: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for layers in arguments.layers:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    measured = start(with_layers(config, layers), 1, cache, arguments.timeout)
                    starts.setdefault(f"{layers} layers, {kind}", []).append(measured[0])
        if arguments.ranks > 1:
            first = with_layers(config, arguments.layers[0])
            with tempfile.TemporaryDirectory() as cache:
                of_ranks = start(first, arguments.ranks, cache, arguments.timeout)
            for rank, measured_rank in enumerate(of_ranks):
                label = f"{arguments.layers[0]} layers, cold, rank {rank} of {arguments.ranks}"
                starts.setdefault(label, []).append(measured_rank)
    return {
        "config": str(arguments.config),
        "rounds": arguments.rounds,
        "starts": {label: _median(rounds) for label, rounds in starts.items()},
        "layers": arguments.layers,
    }


def with_layers(config: Config, layers: int) -> Config:
    """The configuration at this depth; what only some blocks have, the same share of them has."""
    model = config.model
    share = layers / model.num_layers
    changes = {
        "num_layers": layers,
        "xsa_last_n": round(model.xsa_last_n * share),
        "parallel_residual_start": min(model.parallel_residual_start, layers - 1),
        "loop_end": min(model.loop_end, layers - 1),
        "loop_start": min(model.loop_start, layers - 1),
    }
    return config.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "parallel": config.parallel.model_copy(
                update={"compile": True, "compile_warmup": True}
            ),
            "data": config.data.model_copy(update={"workers": 0}),
        }
    )


def start(config: Config, ranks: int, cache: str, timeout: float) -> list[dict[str, Any]]:
    """Start so many ranks with this cache folder; what each measured."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = with_random_data(config, Path(folder))
        return on_ranks(_start, ranks, prepared, cache, timeout=timeout)


def _start(device: torch.device, config: Config, cache: str) -> dict[str, Any]:
    """On one rank: the first warm-up against the second."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    trainer = build_trainer(config, start_world(config.parallel))
    before = _cpu_seconds()
    first = _seconds_of_warm_up(trainer, device)
    cpu = _cpu_seconds() - before
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    second = _seconds_of_warm_up(trainer, device)
    trainer.segment.batches.close()
    return {
        "seconds": first - second,
        "warm_up_seconds": first,
        "cpu_seconds": cpu,
        "graphs": graphs,
        "recompiled": counters["stats"]["unique_graphs"] - graphs,
        "compiled": inductor["fxgraph_cache_miss"],
        "reused": inductor["fxgraph_cache_hit"],
        "reused_whole": autograd["autograd_cache_hit"],
    }


def _seconds_of_warm_up(trainer: Trainer, device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    trainer.warm_up.run(lambda _: None)
    synchronize(device)
    return time.perf_counter() - begun


def _cpu_seconds() -> float:
    """Of this process and of the compiler's workers, those that have ended included."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: median(measured[name] for measured in rounds) for name in rounds[0]}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown, and the two ratios that should stay small."""
    columns = ["start", "compilation, s", "CPU, s", "graphs", "compiled", "reused", "recompiled"]
    starts = result["starts"]
    rows = [
        [
            label,
            f"{measured['seconds']:.1f}",
            f"{measured['cpu_seconds']:.1f}",
            measured["graphs"],
            measured["compiled"],
            measured["reused"] + measured["reused_whole"],
            measured["recompiled"],
        ]
        for label, measured in starts.items()
    ]
    shallow, deep = min(result["layers"]), max(result["layers"])
    depth = starts[f"{deep} layers, cold"]["seconds"] / starts[f"{shallow} layers, cold"]["seconds"]
    warm = (
        starts[f"{shallow} layers, warm"]["seconds"] / starts[f"{shallow} layers, cold"]["seconds"]
    )
    caption = f"{result['config']} at other depths; median of {result['rounds']} start(s)"
    ratios = (
        f"{deep} layers cost {depth:.2f} times {shallow}; a warm start {warm:.0%} of a cold one."
    )
    return f"{caption}\n\n{markdown_table(columns, rows)}\n\n{ratios}"
