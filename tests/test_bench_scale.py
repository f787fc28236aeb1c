"""The scale benchmark: real ranks, and correct counts for simulated clusters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from jepa_dist.bench.comm import minimum
from jepa_dist.bench.scale import simulated_config
from jepa_dist.config import load
from jepa_dist.model.execution import LAST_PHASE
from tests.support.commands import run_command

BENCH = (sys.executable, "-m", "jepa_dist.bench")
TINY = """
batch: {sequences: 16, micro: 1}
model: {num_layers: 4, model_dim: 32, num_heads: 2, num_kv_heads: 1, mlp_mult: 2, seq_len: 32,
        vocab_size: 256, num_loops: 1, loop_start: 1, loop_end: 1}
optim: {matrix: muon, ema_decay: 0.9}
data: {workers: 0}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.slow
def test_a_simulated_cluster_sends_what_the_formulas_say(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "result.json"
    options = ("--simulate", tiny, "--simulated-ranks", 2, 8, 64, "--json", report)
    finished = run_command(*BENCH, "scale", "--config", tiny, "--ranks", *options)
    assert finished.code == 0, finished.output
    (model,) = json.loads(report.read_text())["simulated"].values()
    config = load(tiny).config
    for run, ranks in zip(model["runs"], (2, 8, 64), strict=True):
        must = minimum(simulated_config(config, ranks), ranks, LAST_PHASE, torch.device("cuda"))
        for kind in ("all_gather", "reduce_scatter"):
            assert must[kind].bytes <= run["bytes"][kind]
        assert run["launches"]["all_gather"] == must["all_gather"].launches
        # After the first pass of a looped block FSDP2 reduces what earlier micro-batches left, and
        # after the second the rest.
        twice = 1 if run["micro_batches"] > 1 else 0
        assert run["launches"]["reduce_scatter"] == must["reduce_scatter"].launches + twice
        assert run["launches"]["all_reduce"] == 1  # the norm; the metrics belong to the trainer
        assert run["launches"]["all_to_all"] <= 8
        memory = run["memory"]
        # Rank 0's shards are the largest; up to padding they are the W-th part.
        assert memory["parameters"] >= 4 * model["parameters"] / ranks
        assert memory["gradients"] == memory["parameters"] == memory["average"]
        assert memory["parameters"] < memory["optimizer"] < 2 * memory["parameters"]
        is_accumulated = run["micro_batches"] > 1
        assert (memory["whole gradients"] == 4 * model["parameters"]) == is_accumulated
        assert (memory["gathered parameters"] == 2 * model["parameters"]) == is_accumulated
    assert finished.output.count("| tiny |") == 6


@pytest.mark.slow
def test_real_scaling(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "result.json"
    options = ("--ranks", 1, 2, "--rounds", 1, "--json", report, "--simulate", "--set")
    finished = run_command(
        *BENCH, "scale", "--config", tiny, *options, "parallel.compile=false", timeout=600
    )
    assert finished.code == 0, finished.output
    rows = json.loads(report.read_text())["real"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert all(row["strong"] > 0 and row["weak"] > 0 for row in rows)
