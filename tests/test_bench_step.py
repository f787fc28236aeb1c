"""The benchmarks of a training step: comparable loops and correct counts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.bench import head_loss as head_bench
from jepa_dist.bench import jepa as jepa_bench
from jepa_dist.bench.peak_memory import peak_bytes
from jepa_dist.bench.step_floor import Floor
from jepa_dist.bench.training import steady
from jepa_dist.config import Config
from jepa_dist.parallel.world import start_world
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.training.assemble import build_trainer
from tests.support.commands import run_command
from tests.support.forked import run_module
from tests.support.graphs import CountingBackend
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus

BENCH = (sys.executable, "-m", "jepa_dist.bench")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


# ------------------------------------------------------------------ memory


def test_peak_bytes_counts_simultaneous_allocations() -> None:
    outside = torch.ones(4096)

    def call() -> None:
        one = torch.empty(1000)
        two = torch.empty(3000)
        del two
        one.add_(torch.empty(2000).sum())
        outside.mul_(2.0)

    assert peak_bytes(call, CPU) == 4 * 4000
    assert peak_bytes(lambda: None, CPU) == 0


# ------------------------------------------------------------------ head


def test_chunked_head_is_exact_and_uses_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_bench, "_compiled", lambda fn: fn)
    arguments = argparse.Namespace(
        vocab=[256, 8192], rows=1024, width=16, dtype="float32", rounds=2
    )
    result = head_bench.run(arguments)
    small, large = result["runs"]
    assert (small["chosen_chunks"], small["chunks"]) == (1, 2)
    assert large["chosen_chunks"] == large["chunks"] == 4
    for run in result["runs"]:
        for form in run["forms"].values():
            assert form["loss_error"] < 1e-6
            assert form["gradient_error"] < 1e-6
            assert len(form["seconds_of_each_round"]) == 2
    full, chunked = large["forms"]["full"]["peak_bytes"], large["forms"]["chunked"]["peak_bytes"]
    assert full > 2 * 4 * 1024 * 8192
    assert chunked < full / 2
    assert head_bench.table(result).count("\n| ") == 4


# ------------------------------------------------------------------ step


def one_step(rank: int, world_size: int, config: Config) -> dict[str, float]:
    """Step the trainer and the floor on one batch; return the difference of their weights."""
    world = start_world(config.parallel)
    trainer = build_trainer(config, world)
    plan = Planner(config, TrainingClock()).plan(0)
    floor = Floor(config, world, plan.phase)
    batch = next(trainer.segment.batches)
    floor._tokens_BT, floor._targets_BT = batch.tokens, batch.targets
    trainer.segment.batches.close()
    segment = replace(trainer.segment, batches=iter([batch]))
    floor._optimizer.set_schedule(plan.lr_multiplier, plan.muon_momentum)
    before = {name: p.detach().clone() for name, p in floor._master.named_parameters()}
    trainer.train_step(plan, segment)
    floor.step()
    trained = {name: p.full_tensor().detach() for name, p in trainer.state.model.named_parameters()}
    found = dict(floor._master.named_parameters())
    moved = max((found[name] - before[name]).abs().max().item() for name in found)
    apart = max((found[name] - trained[name]).abs().max().item() for name in found)
    return {"moved": moved, "apart": apart}


@pytest.mark.parametrize(
    ("matrix", "precision", "tolerance"),
    [("adamw", "float32", 1e-3), ("muon", "float32", 1e-3), ("muon", "bfloat16", 0.1)],
)
def test_the_floor_does_what_the_trainer_does(
    corpus: Path, matrix: str, precision: str, tolerance: float
) -> None:
    config = tiny_config(
        corpus,
        jepa__lambda=0,
        batch__micro=6,
        optim__matrix=matrix,
        optim__ema_decay=0.9,
        parallel__precision=precision,
    )
    (result,) = run_ranks(one_step, 1, config, timeout=240)
    assert result["moved"] > 1e-4
    assert result["apart"] < tolerance * result["moved"]


def test_steps_of_a_round_are_alike(corpus: Path) -> None:
    config = steady(tiny_config(corpus, eval__every=2), rounds=3, steps=4)
    planner = Planner(config, TrainingClock())
    plans = [planner.plan(step) for step in range(12)]
    assert [plan.step for plan in plans if plan.log] == [3, 7, 11]
    assert [plan.stop for plan in plans] == [False] * 11 + [True]
    assert {plan.phase for plan in plans} == {0}
    assert not any(plan.evaluate or plan.last or plan.probe for plan in plans)


# ------------------------------------------------------------------ jepa


def new_graphs(rank: int, world_size: int, config: Config) -> dict[str, int]:
    """Count the compiled graphs with a counting backend."""
    plain, backend = torch.nn.Module.compile, CountingBackend()
    torch.nn.Module.compile = lambda self, **options: plain(self, backend=backend, **options)
    trainer = build_trainer(config, start_world(config.parallel))
    measured = jepa_bench.measure(jepa_bench.variants(trainer), rounds=1, steps=1, device=CPU)
    trainer.segment.batches.close()
    assert sum(v["new_graphs"] for v in measured["variants"].values()) == len(backend.graphs)
    return {name: variant["new_graphs"] for name, variant in measured["variants"].items()}


def test_jepa_off_compiles_the_same_graphs_as_without_it(corpus: Path) -> None:
    config = steady(tiny_config(corpus, parallel__compile=True), rounds=1, steps=1)
    (graphs,) = run_ranks(new_graphs, 1, config, timeout=240)
    assert graphs == {"absent": 5, "off": 0, "on": 1}


# ------------------------------------------------------------------ commands

TINY = (
    "model.num_layers=2",
    "model.model_dim=32",
    "model.seq_len=64",
    "model.rope_dims=8",
    "model.num_loops=0",
    "model.parallel_residual_start=1",
    "batch.sequences=4",
    "batch.micro=2",
    "data.workers=0",
    "parallel.compile=false",
)


def bench(name: str, *arguments: Any, folder: Path) -> dict[str, Any]:
    report = folder / "result.json"
    finished = run_command(*BENCH, name, "--set", *TINY, "--json", report, *arguments, timeout=300)
    assert finished.code == 0, finished.output
    assert "| --- |" in finished.output
    return json.loads(report.read_text())


@pytest.mark.slow
def test_data_command(tmp_path: Path) -> None:
    result = bench(
        "data",
        *("--shards", 20, "--windows", 10, "--batches", 50, "--workers", 0, 1, "--rounds", 2),
        folder=tmp_path,
    )
    assert [run["workers"] for run in result["alone"]] == [0, 1]
    for run in result["alone"]:
        assert run["tokens_per_second"] == pytest.approx(50 * 2 * 64 / run["seconds"])
        assert 15 < run["shards_read"] <= 20
        assert run["memory_end"] < 1.1 * run["memory_middle"]
    assert 0 < result["training"]["share"] < 1


@pytest.mark.slow
def test_step_command(tmp_path: Path) -> None:
    result = bench("step", "--rounds", 2, "--steps", 2, folder=tmp_path)
    trainer, floor = (result["loops"][name] for name in ("trainer", "floor"))
    assert len(result["ratios"]) == len(trainer["seconds_of_each_round"]) == 2
    assert trainer["tokens_per_second"] == pytest.approx(4 * 64 / trainer["seconds"])
    assert trainer["peak_bytes"] > 0.5 * floor["peak_bytes"] > 0
    assert trainer["mfu"] is None  # no figure for a device whose peak is not known
    assert sum(result["breakdown"].values()) == pytest.approx(1.0, abs=0.2)


def test_user_errors_are_reported(tmp_path: Path) -> None:
    finished = run_module("jepa_dist.bench", "jepa", "--rounds", 0, timeout=300)
    assert finished.code == 2
    assert "--rounds and --steps must be at least 1" in finished.output
    assert "Traceback" not in finished.output
