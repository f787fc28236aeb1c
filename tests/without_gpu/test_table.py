"""The comparison with the committed table, and the predictions; needs no CUDA build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jepa_dist.config import load
from tests.support.tiny import REPOSITORY
from tests.without_gpu import environment
from tests.without_gpu.roofline import predict, step_milliseconds
from tests.without_gpu.run import CONFIGS
from tests.without_gpu.table import (
    UPDATE_COMMAND,
    Graph,
    Table,
    differences,
    read_expected,
    write_expected,
)

_GRAPH = Graph(
    config="gpt_36m",
    region="blocks.0",
    direction="forward",
    kernels=100,
    bytes=2_700_000_000,
    calls={"mm": 6, "_scaled_dot_product_cudnn_attention": 1},
    flops=550_000_000_000,
    sources=90,
    cubins=90,
    runs={"0": 7, "2": 11},
    attention="cudnn",
    checkpointing="none",
)
_KEY = "gpt_36m blocks.0 cudnn none forward"


def test_a_change_of_more_than_two_percent_is_named() -> None:
    expected = {_KEY: _GRAPH.counts}
    more = replace(_GRAPH, bytes=int(1.03 * _GRAPH.bytes), kernels=102)
    first, advice = differences(expected, [more])
    assert first == f"{_KEY}: bytes 2,700,000,000 -> 2,781,000,000 (+3.0 %)"
    assert UPDATE_COMMAND in advice
    fewer = replace(_GRAPH, kernels=97, bytes=int(1.019 * _GRAPH.bytes))
    assert differences(expected, [fewer])[0] == f"{_KEY}: kernels 100 -> 97 (-3.0 %)"
    call = replace(_GRAPH, calls={"mm": 7, "_scaled_dot_product_cudnn_attention": 1})
    assert differences(expected, [call])[0] == f"{_KEY}: calls 7 -> 8 (+14.3 %)"
    within = replace(_GRAPH, bytes=int(0.981 * _GRAPH.bytes), kernels=102)
    assert differences(expected, [within]) == []


def test_added_or_removed_graphs_are_named() -> None:
    assert differences({}, [_GRAPH])[0] == f"{_KEY}: is compiled now, and was not before"
    gone = differences({_KEY: _GRAPH.counts}, [])
    assert gone[0] == f"{_KEY}: was compiled before, and is not now"


def test_the_table_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "expected.json"
    table = Table("2.11.0+cu130", (_GRAPH,))
    write_expected(table, path)
    assert read_expected(path) == {"torch": "2.11.0+cu130", "graphs": {_KEY: _GRAPH.counts}}
    assert sum(_KEY in line for line in path.read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="gpt_36m flash full"):
        write_expected(replace(table, failures={"gpt_36m flash full": "IndexError"}), path)
    table.write(path)
    assert Table.read(path) == table


def test_the_committed_table_has_what_is_measured_on_gpus() -> None:
    committed = read_expected()
    assert committed["torch"].split("+")[0] == environment.TORCH_VERSION
    configurations = {key.split()[0] for key in committed["graphs"]}
    assert {"gpt_36m", "gpt_1b"} <= configurations <= {path.stem for path in CONFIGS}


def test_predicted_time_is_bytes_products_and_attention() -> None:
    config = load(REPOSITORY / "configs/gpt_36m.yaml", [], {}).config
    backward = replace(
        _GRAPH,
        direction="backward",
        calls={"_scaled_dot_product_cudnn_attention_backward": 1},
        runs=_GRAPH.runs,
    )
    forward, back = predict([_GRAPH, backward], config)
    assert forward.kernels == pytest.approx(1.0)
    assert forward.products == pytest.approx(1.0)
    # 48 rows, 8 heads, 2048 x 2048 scores of width 64, forward: two products, half of them.
    assert forward.attention == pytest.approx(2 * 48 * 8 * 2048**2 * 64 / 336e12 * 1e3)
    assert back.attention == pytest.approx(2.5 * forward.attention)
    # Both took 2.15 ms on an H200.
    assert forward.attention + back.attention == pytest.approx(2.15, rel=0.01)
    both = forward.total + back.total
    assert step_milliseconds([forward, back], "2", "cudnn", "none") == pytest.approx(11 * both)
    assert step_milliseconds([forward, back], "2", "flash", "none") == 0


def test_a_missing_environment_gives_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(environment.UnavailableError, match=environment.INSTALL_COMMAND):
        environment.find()
