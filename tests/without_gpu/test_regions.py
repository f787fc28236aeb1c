"""Every region of the shipped configurations compiles for sm_90, to the expected kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepa_dist.config import ModelConfig, load
from jepa_dist.objectives.registry import OBJECTIVES
from tests.without_gpu import environment, run
from tests.without_gpu.table import ATTENTION, CHECKPOINTING, Table, differences, read_expected

pytestmark = [pytest.mark.cuda_build, pytest.mark.timeout(3700)]


@pytest.fixture(scope="module")
def table() -> Table:
    try:
        environment.find()
    except environment.UnavailableError as error:
        pytest.skip(str(error))
    return run.compile_regions()


@pytest.mark.parametrize("path", run.CONFIGS, ids=lambda path: path.stem)
def test_every_region_assembles(table: Table, path: Path) -> None:
    config = path.stem
    assert {k: v for k, v in table.failures.items() if k.split()[0] == config} == {}
    graphs = table.of(config)
    assert {graph.key: graph.cubins for graph in graphs} == {g.key: g.sources for g in graphs}
    assert all(0 < graph.sources <= graph.kernels for graph in graphs)
    found = {(graph.region, graph.direction) for graph in graphs}
    for region in ("embed", "blocks.0", "skip", "head"):
        assert {(region, d) for d in ("forward", "backward", "validation")} <= found
    for objective in OBJECTIVES:
        region = f"objective.{objective}"
        assert {(region, "forward"), (region, "backward")} <= found
    for graph in graphs:
        if graph.region.startswith("blocks.") and graph.direction == "forward":
            assert graph.calls[f"_scaled_dot_product_{graph.attention}_attention"] == 1


@pytest.mark.parametrize("path", run.CONFIGS, ids=lambda path: path.stem)
def test_blocks_of_a_kind_share_a_graph_in_every_variant(table: Table, path: Path) -> None:
    first_of_kind = _first_of_kind(load(path, [], {}).config.model)
    graphs = [g for g in table.of(path.stem) if g.region.startswith("blocks.")]
    for attention in ATTENTION:
        for checkpointing in CHECKPOINTING:
            variant = [
                g for g in graphs if (g.attention, g.checkpointing) == (attention, checkpointing)
            ]
            assert {graph.region for graph in variant} == first_of_kind, (attention, checkpointing)


def _first_of_kind(model: ModelConfig) -> set[str]:
    """Blocks differ in whether their branches are parallel and whether they remove own values."""
    kinds: dict[tuple[bool, bool], str] = {}
    for index in range(model.num_layers):
        parallel = 0 <= model.parallel_residual_start <= index
        kind = (parallel, index >= model.num_layers - model.xsa_last_n)
        kinds.setdefault(kind, f"blocks.{index}")
    return set(kinds.values())


def test_kernels_and_bytes_are_as_in_the_table(table: Table) -> None:
    expected = read_expected()
    if table.torch != expected["torch"]:
        pytest.skip(f"the table holds for torch {expected['torch']}, and this is {table.torch}")
    tabled = {key.split()[0] for key in expected["graphs"]}
    found = [graph for graph in table.graphs if graph.config in tabled]
    changed = differences(expected["graphs"], found)
    assert not changed, "\n".join(changed)
