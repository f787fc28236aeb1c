"""Compile regions: what is compiled, and how often, with a fast backend that counts graphs.

Most tests count the graphs of one rank; two compile the same (the tests of the warm-up).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jepa_dist.config import Config
from tests.support.graphs import compiled, count
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, train
from tests.support.tiny import tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def counted(corpus: Path, **changes: Any) -> Config:
    """Return a config with two micro-batches and by default eight steps through all phases.

    The counts depend on neither number, and graphs that run eagerly are slow.
    """
    few = {"batch__sequences": 2, "batch__micro": 1, "train__steps": 8}
    return compiled(corpus, **few | changes)


@pytest.fixture(scope="module")
def graphs_without_objective(corpus: Path) -> list[str]:
    return run_ranks(count, 1, counted(corpus, jepa__lambda=0))[0][1]


@pytest.mark.slow
def test_no_recompiles_over_changing_spans_lambda_and_phases(corpus: Path) -> None:
    config = counted(corpus, batch__sequences=4, train__steps=25, jepa__ramp_frac=0.9)
    records, graphs = run_ranks(count, 1, config)[0]
    assert {record["phase"] for record in records} == {0, 1, 2}
    assert len({record["jepa/lambda"] for record in records}) > 20
    # Embedding, two kinds of block, skip, head; all once more without gradient for validation;
    # and the JEPA loss.
    assert len(graphs) == records[-1]["compile/graphs"] == 2 * 5 + 1
    assert records[-1]["compile/recompiles"] == 0
    # The ramp begins with lambda 0, that is without the objective.
    assert [record["compile/graphs"] for record in records[:3]] == [5, 6, 6]


@pytest.mark.slow
def test_untied_loop_mlps_share_the_graph(corpus: Path) -> None:
    config = counted(corpus, model__untie_loop_mlps=True, jepa__lambda=0)
    records, graphs = run_ranks(count, 1, config)[0]
    assert len(graphs) == 2 * 5
    assert records[-1]["compile/recompiles"] == 0


@pytest.mark.slow
def test_jepa_off_compiles_what_a_build_without_it_does(
    graphs_without_objective: list[str], corpus: Path
) -> None:
    absent = run_ranks(count, 1, counted(corpus, jepa__lambda=0), True)[0][1]
    assert graphs_without_objective == absent


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["span", "next_state", "next_latent"])
def test_jepa_starting_mid_run_adds_exactly_one_graph(
    objective: str, graphs_without_objective: list[str], corpus: Path
) -> None:
    changes = {"jepa__objective": objective, "jepa__ramp_frac": 0.2, "jepa__stop_frac": 0.9}
    config = counted(corpus, train__steps=20, jepa__start_frac=0.45, eval__every=5, **changes)
    records, graphs = run_ranks(count, 1, config)[0]
    is_on = [record["loss/jepa"] is not None for record in records]
    assert is_on == [False] * 10 + [True] * 8 + [False] * 2  # the ramp begins with lambda 0
    before, after = (
        [r["compile/graphs"] for r in records[part]] for part in (slice(10), slice(10, 20))
    )
    assert set(after) == {before[-1] + 1}
    assert records[-1]["compile/recompiles"] == 0
    off = Counter(graphs_without_objective)
    assert Counter(graphs) - off == Counter([graphs[-1]])
    assert not off - Counter(graphs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_keeps_one_graph_per_region(corpus: Path, mode: str) -> None:
    config = counted(corpus, parallel__activation_checkpointing=mode)
    records, graphs = run_ranks(count, 1, config)[0]
    assert len(graphs) == 2 * 5 + 1
    assert records[-1]["compile/recompiles"] == 0


@pytest.mark.slow
def test_graphs_do_not_grow_with_depth(corpus: Path) -> None:
    shape = {"model__xsa_last_n": 99, "model__parallel_residual_start": -1, "train__steps": 2}
    four, twelve = (
        len(run_ranks(count, 1, counted(corpus, model__num_layers=layers, **shape))[0][1])
        for layers in (4, 12)
    )
    assert four == twelve


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_equals_eager(corpus: Path) -> None:
    """With the real compiler."""
    eager = run_ranks(train, 1, tiny_config(corpus))[0]
    warmed_up = compiled(corpus, parallel__compile_warmup=True)  # so rank 1 takes rank 0's graphs
    records = run_ranks(train, 2, warmed_up, timeout=600)[0]
    assert records[-1]["compile/recompiles"] == 0
    assert_same_run(records, eager)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_warm_up_leaves_nothing_to_compile_and_changes_nothing(corpus: Path, replicas: int) -> None:
    changes = {"jepa__start_frac": 0.5, "eval__every": 3, "optim__matrix": "muon"}
    changes |= {"parallel__dp_replicate": replicas, "batch__sequences": 4}
    cold = run_ranks(count, 2, counted(corpus, **changes))[0][0]
    config = counted(corpus, parallel__compile_warmup=True, **changes)
    warm, graphs = run_ranks(count, 2, config)[0]
    assert {record["compile/graphs"] for record in warm} == {len(graphs)}
    assert warm[-1]["compile/recompiles"] == 0
    for ours, expected in zip(warm, cold, strict=True):
        for key in ("loss/ce", "loss/jepa", "grad_norm", "val/loss", "tokens_digest"):
            assert ours.get(key) == expected.get(key)  # bit for bit
