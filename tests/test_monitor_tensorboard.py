"""TensorBoard event files of records and real runs, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from jepa_dist.config import ModelConfig
from jepa_dist.model.summary import model_summary
from jepa_dist.monitor.charts import LAYOUT
from jepa_dist.monitor.console import log_line
from jepa_dist.monitor.environment import environment, git_state
from jepa_dist.monitor.events import EventFile
from jepa_dist.monitor.writer import MetricsWriter
from jepa_dist.optim.update_ratio import UpdateRatio
from tests.support.commands import run_command
from tests.support.forked import run_module
from tests.support.tiny import tiny_overrides, write_corpus

PATTERNS = [
    re.compile(tag) for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags
]
# Charts of CUDA devices, several ranks, documents with boundaries, and long runs with saves.
NOT_IN_THIS_RUN = {
    *("^mfu$", "^system/gpu_percent$", "^system/gpu_celsius$", "^straggler/.*$"),
    *("^jepa/within_doc$", "^jepa/cross_doc$", "^jepa/rows_without_span$", "^jepa/counted$"),
    *("^jepa/target_effective_rank$", "^jepa/target_mean_cosine$"),  # of next_state
    *("^jepa/distance$", "^jepa/kl$"),  # of next_latent
    *("^checkpoint/slowdown$", "^mixture/share/.*$", "^mixture/epochs/.*$", "^loss/ce/.*$"),
}


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def curve(board: EventAccumulator, tag: str) -> dict[int, list[float]]:
    """Return lists of all values by step; two at one step would be drawn twice."""
    values: dict[int, list[float]] = {}
    for event in board.Tensors(tag):
        value = tensor_util.make_ndarray(event.tensor_proto).item()
        values.setdefault(event.step, []).append(value)
    return values


def text(board: EventAccumulator, tag: str) -> str:
    event = board.Tensors(f"{tag}/text_summary")[-1]
    return event.tensor_proto.string_val[0].decode()


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with all monitoring, stopped after 7 steps and resumed to its end."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    config = folder / "config.yaml"
    config.touch()
    changes = {"train__steps": 12, "monitor__jepa_every": 3, "monitor__histogram_every": 6}
    changes |= {"checkpoint__every": 4}
    settings = tiny_overrides(folder, eval__every=6, eval__sample_tokens=8, **changes)
    for more in (["train.stop_at=7"], []):
        done = run_module("jepa_dist.train", config, *settings, *more, timeout=280)
        assert done.code == 0, done.output
    return folder / "run"


@pytest.fixture(scope="module")
def board(run_dir: Path) -> EventAccumulator:
    return events(run_dir / "tensorboard")


pytestmark = pytest.mark.timeout(600)


def test_every_number_is_in_both_files_once(run_dir: Path, board: EventAccumulator) -> None:
    """Across a stop and a start: no gap, no duplicate, equal up to float32."""
    lines = [record for record in records(run_dir) if not record.get("final")]
    assert [record["step"] for record in lines] == list(range(1, 13))
    scalars = set(board.Tags()["tensors"]) - {
        tag for tag in board.Tags()["tensors"] if board.SummaryMetadata(tag).data_class != 1
    }
    expected: dict[str, dict[int, list[float]]] = {}
    for record in lines:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                expected.setdefault(key, {})[record["step"]] = [value]
    assert scalars == expected.keys()
    for tag, values in expected.items():
        shown = curve(board, tag)
        assert shown.keys() == values.keys(), tag
        for step, value in values.items():
            assert shown[step] == pytest.approx(value, rel=1e-6, nan_ok=True), (tag, step)


def test_the_first_page_shows_every_number(run_dir: Path, board: EventAccumulator) -> None:
    shown = layout_pb2.Layout()
    (tag,) = board.PluginTagToContent("custom_scalars")
    shown.ParseFromString(board.Tensors(tag)[-1].tensor_proto.string_val[0])
    assert [category.title for category in shown.category] == list(LAYOUT)
    numbers = {
        key
        for record in records(run_dir)
        if not record.get("final")
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }
    forgotten = {key for key in numbers if not any(p.search(key) for p in PATTERNS)}
    assert not forgotten
    idle = {p.pattern for p in PATTERNS if not any(p.search(key) for key in numbers)}
    assert idle <= NOT_IN_THIS_RUN


def test_texts(run_dir: Path, board: EventAccumulator) -> None:
    assert "lambda: 0.1" in text(board, "config")
    assert torch.__version__ in text(board, "environment")
    assert "total" in text(board, "model")
    assert "FLOPs per token, phase 2" in text(board, "model")
    assert text(board, "sample").strip()


def test_the_run_is_a_row_of_the_hparams_table(run_dir: Path, board: EventAccumulator) -> None:
    hparams = {
        tag: HParamsPluginData.FromString(content)
        for tag, content in board.PluginTagToContent("hparams").items()
    }
    start = hparams["_hparams_/session_start_info"].session_start_info
    assert start.hparams["jepa.lambda"].number_value == pytest.approx(0.1)
    assert start.hparams["optim.matrix_lr"].number_value == pytest.approx(0.002)
    assert start.hparams["seed"].number_value == 0
    metrics = [m.name.tag for m in hparams["_hparams_/experiment"].experiment.metric_infos]
    assert "val/bpb" in metrics
    assert set(metrics) <= set(board.Tags()["tensors"])


def test_histograms_and_the_image_of_cosines(run_dir: Path, board: EventAccumulator) -> None:
    kinds = {
        tag: board.SummaryMetadata(tag).plugin_data.plugin_name for tag in board.Tags()["tensors"]
    }
    histograms = {tag for tag, kind in kinds.items() if kind == "histograms"}
    assert {"weights/tok_emb.weight", "gradients/tok_emb.weight"} <= histograms
    assert [event.step for event in board.Tensors("weights/tok_emb.weight")] == [6, 12]
    (image,) = [tag for tag, kind in kinds.items() if kind == "images"]
    assert image.startswith("jepa/cos_table")
    assert [event.step for event in board.Tensors(image)] == [3, 6, 9, 12]


def test_an_event_file_contains_what_was_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "new", purge_step=4)
    file.scalars({"a": 1.5, "b": float("nan")}, 3)
    file.text("note", "two\nlines", 3)
    file.close()
    (path,) = (tmp_path / "new").iterdir()
    version, start, first, second = event_file_loader.LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert start.step == 4
    assert next((v.tag, v.simple_value) for v in first.summary.value) == ("a", 1.5)
    assert np.isnan(first.summary.value[1].simple_value)
    assert second.summary.value[0].tensor.string_val == [b"    two\n    lines"]


def test_steps_repeated_after_a_roll_back_are_shown_once(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = MetricsWriter(tmp_path, step=2)
    for step in range(3, 7):
        second.write({"step": step, "loss": 2.0})
    second.close()
    shown = curve(events(tmp_path / "tensorboard"), "loss")
    assert shown == {1: [1.0], 2: [1.0], 3: [2.0], 4: [2.0], 5: [2.0], 6: [2.0]}
    assert [r["loss"] for r in records(tmp_path)] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]


# ------------------------------------------------------------------ single parts

EXTREME = [0.0, -1e-30, 1e30, -1e300, 12345.6789, 999_999.0, float("inf"), float("nan")]


@pytest.mark.parametrize("value", EXTREME)
def test_a_logged_step_fits_120_columns(value: float) -> None:
    keys = ("loss/ce", "loss/jepa", "val/bpb", "grad_norm", "tokens_per_second", "mfu")
    record = {"step": 9_999_999, **dict.fromkeys(keys, value)}
    line = log_line(record, 10_000_000)
    assert len(line) <= 120
    assert "\n" not in line
    assert line.startswith("step  9999999/10000000  ce ")


def test_an_ordinary_line() -> None:
    record = {
        **{"step": 20, "loss/ce": 3.31061, "loss/jepa": None, "grad_norm": 0.314},
        **{"tokens_per_second": 7_710_000.0, "mfu": 0.4612, "val/bpb": 1.08765},
    }
    assert log_line(record, 400) == (
        "step  20/400  ce 3.3106  val 1.0877 bpb  grad 0.31  7,710,000 tok/s  mfu 46.1%"
    )


def test_the_update_relative_to_the_weight() -> None:
    """All elements of small tensors are sampled: the ratio is exact."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 5, generator=generator) for _ in range(3)]
    ratio = UpdateRatio({"matrix": weights[:2], "scalar": weights[2:]})
    assert ratio.after() == {}
    before = [weight.clone() for weight in weights]
    ratio.before()
    for weight in weights:
        weight += 0.01 * torch.randn(7, 5, generator=generator)
    found = ratio.metrics({name: value.item() for name, value in ratio.after().items()})
    moved = [w - b for w, b in zip(weights, before, strict=True)]
    expected = torch.stack(moved[:2]).norm() / torch.stack(weights[:2]).norm()
    assert found["update_ratio/matrix"] == pytest.approx(expected.item(), rel=1e-5)
    expected = moved[2].norm() / weights[2].norm()
    assert found["update_ratio/scalar"] == pytest.approx(expected.item(), rel=1e-5)
    assert ratio.metrics({}) == {}


def test_a_sample_of_a_large_weight_is_enough() -> None:
    """A large weight with small and a small one with large updates count by their elements."""
    generator = torch.Generator().manual_seed(1)
    large, small = (torch.randn(n, 400, generator=generator) for n in (300, 5))
    before = torch.cat([large, small]).clone()
    ratio = UpdateRatio({"matrix": [large, small]})
    ratio.before()
    large *= 1.001
    small *= 1.1
    found = ratio.metrics({name: value.item() for name, value in ratio.after().items()})
    after = torch.cat([large, small])
    expected = ((after - before).norm() / after.norm()).item()
    assert found["update_ratio/matrix"] == pytest.approx(expected, rel=3e-2)


def test_environment_and_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPA_LAMBDA", "0.02")
    found = environment(world_size=3)
    assert (found["ranks"], found["JEPA_LAMBDA"]) == ("3", "0.02")
    assert git_state(tmp_path) == {}  # no repository
    monkeypatch.setenv("PATH", "")
    assert git_state(Path(__file__).parent) == {}  # no git


def test_git_state_names_what_changed(tmp_path: Path) -> None:
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@localhost"]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        assert run_command(*git, *arguments).code == 0
    assert git_state(tmp_path)["changed since"] == "nothing"
    (tmp_path / "file").write_text("two")
    state = git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"])
    assert state["changed since"] == "1 files: file"


def test_the_model_in_a_few_lines() -> None:
    weights = [("tok_emb.weight", torch.zeros(10, 4)), ("blocks.0.mlp.up", torch.zeros(4, 8))]
    text = model_summary(weights, ModelConfig())
    assert re.search(r"tok_emb +40 parameters", text)
    assert re.search(r"blocks\.0 +32 parameters", text)
    assert re.search(r"total +72 parameters", text)
