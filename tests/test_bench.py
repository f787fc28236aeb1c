"""The benchmarks: tiny real runs; counts are checked, times are not."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from jepa_dist.bench.muon_routes import Measurement, Setup, measure
from tests.support.commands import run_command
from tests.support.forked import run_module
from tests.support.ranks import run_ranks

BENCH = (sys.executable, "-m", "jepa_dist.bench")
ROUNDS = 2
# Rows that the ranks do not divide evenly, and more than one shape.
SHAPES = {"tall": (21, 8), "wide": (8, 20), "square": (12, 12), "another": (9, 16), "last": (7, 4)}
SIZE = 2 * sum(rows * cols for rows, cols in SHAPES.values())  # bfloat16


def _measure(rank: int, world_size: int, replicas: int) -> dict[str, Measurement]:
    return measure(Setup(SHAPES, replicas, ROUNDS), torch.device("cpu"))


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_owners_send_what_the_formula_says(ranks: int, replicas: int) -> None:
    measurements = run_ranks(_measure, ranks, replicas)
    shards = ranks // replicas
    owners = [m["owner"] for m in measurements]
    # A rank sends its rows there and what it owns back: over all ranks that is exact.
    assert sum(m.sent_bytes for m in owners) == SIZE / shards * ranks + SIZE
    for measured in owners:
        assert set(measured.collectives) == {"all_to_all"}
        assert 2 <= measured.collectives["all_to_all"] <= 8
        assert len(measured.seconds) == ROUNDS
    assert all(m["owner"].worst_difference < 1e-2 for m in measurements)
    assert all(m["all_gather"].worst_difference < 1e-2 for m in measurements)


def test_the_other_routes_send_more() -> None:
    for measured in run_ranks(_measure, 3, 1):
        gathered, library = measured["all_gather"], measured["torch"]
        assert gathered.collectives == {"all_gather": 1}
        assert SIZE <= gathered.sent_bytes <= SIZE * 1.3  # shards are padded to one size
        assert library.collectives["all_gather"] > 2 * len(SHAPES)
        assert library.sent_bytes > SIZE


TINY_MODEL = """
model: {num_layers: 2, model_dim: 32, num_heads: 2, num_kv_heads: 1, mlp_mult: 2}
"""


@pytest.mark.slow
def test_command(tmp_path) -> None:
    config, report = tmp_path / "tiny.yaml", tmp_path / "result.json"
    config.write_text(TINY_MODEL)
    arguments = ("--config", config, "--ranks", 2, "--rounds", ROUNDS, "--json", report)
    finished = run_command(*BENCH, "muon", *arguments)
    assert finished.code == 0, finished.output
    result = json.loads(report.read_text())
    assert result["matrices"] == 12
    assert result["command"] == f"python -m jepa_dist.bench muon {' '.join(map(str, arguments))}"
    assert result["versions"]["torch"] == torch.__version__
    assert {"system", "cpu", "cores", "memory_gib", "cuda"} <= set(result["machine"])
    (run,) = result["runs"]
    assert (run["ranks"], run["shards"], run["replicas"], run["backend"]) == (2, 2, 1, "gloo")
    assert list(run["routes"]) == ["owner", "all_gather", "torch"]
    for route in run["routes"].values():
        assert len(route["milliseconds_of_each_step"]) == ROUNDS
        assert route["milliseconds"] > 0
        assert len(route["sent_bytes_of_each_rank"]) == 2
    owner = run["routes"]["owner"]
    assert owner["sent_bytes"] == owner["formula_bytes"] == result["matrix_bytes"]
    assert owner["collectives"] == {"all_to_all": 8}
    assert finished.output.count("| 2 (gloo) |") == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ranks", 3, "--replicas", 2), "--ranks 3: must be a multiple of --replicas 2"),
        (("--timeout", 0.5, "--ranks", 2), "2 ranks did not finish in 0.5 s"),
    ],
)
def test_user_errors_are_one_line_and_leave_no_files(arguments, problem) -> None:
    finished = run_module("jepa_dist.bench", "muon", *arguments)
    assert finished.code == 2
    assert problem in finished.output
    assert "Traceback" not in finished.output
