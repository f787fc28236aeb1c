"""Diagnostics of the objective: states of known kinds, gradients against a plain model, alarms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.monitor.alarms import JepaAlarms
from jepa_dist.monitor.images import cos_image
from jepa_dist.objectives.diagnostics import (
    cosine_table,
    describe_states,
    document_share,
    loss_by_documents,
    sink_share,
)
from jepa_dist.objectives.span import SpanObjective
from jepa_dist.objectives.span_loss import UNSTRUCTURED_LOSS, span_loss
from jepa_dist.objectives.span_probe import SpanProbe
from jepa_dist.objectives.spans import grid_spans, max_length
from jepa_dist.plan import Planner, TrainingClock
from tests.support.graphs import compiled, count
from tests.support.objective import first_forward
from tests.support.ranks import run_ranks
from tests.support.runs import train
from tests.support.tiny import tiny_config, write_corpus

ROWS, LENGTH, WIDTH = 32, 64, 128


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian() -> Tensor:
    return normal(ROWS, LENGTH, WIDTH)


def look(h: Tensor) -> dict[str, Any]:
    """Return all diagnostics of these states, as in a record; documents begin at 0 and 32."""
    probe = SpanProbe(h.size(1), 0.5, bos_id=1, device=torch.device("cpu"))
    tokens = torch.zeros(h.shape[:2], dtype=torch.int64)
    tokens[:, 0] = tokens[:, h.size(1) // 2] = 1
    probe.watch([h], tokens, len(h))
    return probe.metrics({name: value.item() for name, value in probe.measure().items()})


def mean_loss(record: dict[str, Any]) -> float:
    return 1 - float(np.mean(record["jepa/cos_table"]["cos"]))


# ------------------------------------------------------------------ states of known kinds


def test_gaussian_states_are_unstructured() -> None:
    seen = look(gaussian())
    assert mean_loss(seen) == pytest.approx(UNSTRUCTURED_LOSS, abs=0.01)
    assert seen["jepa/within_doc"] == pytest.approx(UNSTRUCTURED_LOSS, abs=0.02)
    assert seen["jepa/cross_doc"] == pytest.approx(UNSTRUCTURED_LOSS, abs=0.02)
    # Of N samples in D dimensions the spectrum is Marchenko and Pastur's: mean square 1 + D/N.
    samples = ROWS * (LENGTH - 1)
    expected = WIDTH / (1 + WIDTH / samples)
    assert seen["jepa/participation_ratio"] == pytest.approx(expected, rel=0.01)
    assert expected < seen["jepa/effective_rank"] < WIDTH
    assert seen["jepa/std"] == pytest.approx(1, abs=0.02)
    assert seen["jepa/mean_share"] == pytest.approx(1 / samples, rel=0.5)
    assert seen["jepa/clock_share"] < 0.005
    assert seen["jepa/sink_share"] == pytest.approx(0.25, abs=0.01)
    assert seen["jepa/straightness"] == pytest.approx(1 / (LENGTH - 1), rel=0.05)


def test_a_straight_line_has_zero_loss_and_is_a_clock() -> None:
    line = torch.arange(float(LENGTH))[None, :, None] * normal(WIDTH)
    seen = look(line.expand(ROWS, -1, -1) + normal(ROWS, 1, 1).clone())
    assert mean_loss(seen) == pytest.approx(0, abs=1e-4)
    assert seen["jepa/straightness"] == pytest.approx(1, abs=1e-4)
    assert seen["jepa/clock_share"] > 0.99
    assert seen["jepa/effective_rank"] == pytest.approx(1, abs=0.05)


def test_a_row_may_go_straight_without_a_clock() -> None:
    """Every row has its own direction: the loss is also 0, but not because of the position."""
    seen = look(torch.arange(float(LENGTH))[None, :, None] * normal(ROWS, 1, WIDTH))
    assert mean_loss(seen) == pytest.approx(0, abs=1e-4)
    assert seen["jepa/clock_share"] < 0.1
    assert seen["jepa/effective_rank"] > 20


def test_clock_share_is_relative_to_the_total_variance() -> None:
    speed = 0.2
    direction = torch.nn.functional.normalize(normal(WIDTH), dim=0)
    time = torch.arange(float(LENGTH))
    seen = look(gaussian() + speed * time[None, :, None] * direction)
    energy = speed**2 * time[1:].var(correction=0).item()
    assert seen["jepa/clock_share"] == pytest.approx(energy / (energy + WIDTH), abs=0.02)
    assert mean_loss(seen) < UNSTRUCTURED_LOSS - 0.05


@pytest.mark.parametrize("norm", [0.0, 1.0, 1e4])
def test_states_at_one_point_have_rank_one(norm: float) -> None:
    point = norm * torch.nn.functional.normalize(normal(WIDTH), dim=0)
    seen = look(point.expand(ROWS, LENGTH, -1).clone())
    assert seen["jepa/effective_rank"] == pytest.approx(1, abs=1e-3)
    assert seen["jepa/participation_ratio"] == pytest.approx(1, abs=1e-3)
    assert seen["jepa/std"] == pytest.approx(0, abs=1e-5 * norm)
    assert seen["jepa/mean_share"] == pytest.approx(float(norm > 0), abs=1e-5)


def test_states_on_one_line_have_rank_one() -> None:
    seen = look(normal(ROWS, LENGTH, 1) * normal(WIDTH))
    assert seen["jepa/effective_rank"] == pytest.approx(1, abs=1e-2)
    assert seen["jepa/participation_ratio"] == pytest.approx(1, abs=1e-3)


def test_ranks_against_numpy() -> None:
    h = gaussian() * torch.linspace(0.1, 3, WIDTH) + 5
    flat = h[:, 1:].reshape(-1, WIDTH).double().numpy()
    share = np.linalg.eigvalsh(np.cov(flat.T))
    share /= share.sum()
    seen = describe_states(h)
    assert seen["effective_rank"].item() == pytest.approx(
        math.exp(-(share * np.log(share)).sum()), rel=1e-3
    )
    assert seen["participation_ratio"].item() == pytest.approx(1 / (share**2).sum(), rel=1e-3)
    assert seen["std"].item() == pytest.approx(flat.std(0).mean(), rel=1e-4)
    mean = flat.mean(0)
    expected = (mean @ mean) / (flat**2).sum(1).mean()
    assert seen["mean_share"].item() == pytest.approx(expected, rel=1e-4)


def test_a_sink_is_measured_and_leaves_other_metrics_unchanged() -> None:
    h = gaussian()
    h[:, 0] *= 100
    seen, without = look(h), look(gaussian())
    assert seen["jepa/sink_share"] > 0.99
    assert mean_loss(seen) == pytest.approx(1, abs=0.05)
    for name in ("effective_rank", "std", "clock_share"):
        assert seen[f"jepa/{name}"] == without[f"jepa/{name}"]


def test_sink_share_by_hand() -> None:
    """Distances from the mean (0) of the states after the first: 3, then 1, 1, 2, 2."""
    h = torch.tensor([3.0, 1, -1, 2, -2])[None, :, None]
    spans = torch.tensor([[[2, 3]]])  # reads 0, 1, 3 and 4
    assert sink_share(h, spans).item() == pytest.approx(9 / (9 + 1 + 4 + 4))


def test_document_offsets_are_recognized() -> None:
    h = gaussian()
    h[:, LENGTH // 2 :] += 3 * normal(ROWS, 1, WIDTH, seed=1)
    seen = look(h)
    # Inside a document only the context has the offset, so the two are at right angles; across,
    # the patch has all of it and the context none.
    assert seen["jepa/within_doc"] < UNSTRUCTURED_LOSS - 0.2
    assert seen["jepa/cross_doc"] < UNSTRUCTURED_LOSS - 0.2
    plain = look(gaussian())
    assert mean_loss(seen) < mean_loss(plain) - 0.2
    # Half the offset's square is the variance between two documents, next to the noise's.
    assert seen["jepa/document_share"] == pytest.approx(2.25 / 3.25, abs=0.03)
    assert plain["jepa/document_share"] == pytest.approx(1 / (LENGTH - 2), abs=0.005)


def test_document_share_by_hand() -> None:
    """Documents of 2, 2 and 1 states (after position 0) with means 1, -2 and 2; row mean 0."""
    h = torch.tensor([99.0, 0, 2, -1, -3, 2])[None, :, None]
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    share = (2 * 1 + 2 * 4 + 4) / (0 + 4 + 1 + 9 + 4)
    assert document_share(h, documents).item() == pytest.approx(share)


def test_losses_by_documents_are_split_where_documents_begin() -> None:
    grid = torch.from_numpy(grid_spans(LENGTH, 0.5, 3, 5))
    cosine = cosine_table(gaussian()[:4], grid)
    documents = (torch.arange(LENGTH) >= 20).long().expand(4, -1)
    seen = loss_by_documents(cosine, grid, documents)
    for row, spans in enumerate(grid.tolist()):
        crosses = [a - 1 < 20 <= b for a, b in spans]
        losses = (1 - cosine[:, row]).sum(0)
        assert seen["cross_count"][row] == 4 * sum(crosses)
        assert seen["within_count"][row] == 4 * (len(spans) - sum(crosses))
        expected = losses[torch.tensor(crosses)].sum().item()
        assert seen["cross_loss"][row].item() == pytest.approx(expected, abs=1e-4)


def test_without_a_bos_document_metrics_are_absent() -> None:
    probe = SpanProbe(LENGTH, 0.5, bos_id=None, device=torch.device("cpu"))
    h = gaussian()
    probe.watch([h], torch.zeros(h.shape[:2], dtype=torch.int64), len(h))
    seen = probe.metrics({name: value.item() for name, value in probe.measure().items()})
    assert "jepa/within_doc" not in seen
    assert probe.measure() == {}  # each measurement is returned once


def test_states_that_are_not_finite_raise_nothing() -> None:
    h = gaussian()
    h[3, 5, 7] = torch.nan
    assert math.isnan(look(h)["jepa/effective_rank"])


@pytest.mark.parametrize("seq_len", [3, 4, 5, 24, 2048])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_the_grid_is_legal(seq_len: int, fraction: float) -> None:
    grid = grid_spans(seq_len, fraction)
    a, b = grid[..., 0], grid[..., 1]
    assert grid.shape == (8, 8, 2)
    assert ((a >= 1) & (a <= b) & (b <= seq_len - 1)).all()
    assert (b - a + 1 <= max_length(seq_len, fraction)).all()
    assert (np.diff(b - a, axis=0) >= 0).all()
    if seq_len > 3:
        assert (a > 1).all()
        assert (b < seq_len - 1).all()


# ------------------------------------------------------------------ in a training step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def first_step_by_hand(config: Config) -> dict[str, float]:
    """Return the first step's gradients at the tapped state, by a backward for each."""
    output, sequences = first_forward(config), config.batch.sequences
    num_targets = sequences * config.model.seq_len
    (ce,) = torch.autograd.grad(output.loss_sum / num_targets, output.taps[0])
    h = output.taps[0].detach().requires_grad_()
    spans = torch.from_numpy(Planner(config, TrainingClock()).plan(0).samples)
    loss = span_loss(h, spans, torch.ones(sequences), config.jepa.norm_floor)[0] / sequences
    (jepa,) = torch.autograd.grad(config.jepa.lambda_ * loss, h)
    cosine = torch.nn.functional.cosine_similarity(ce.flatten(), jepa.flatten(), dim=0)
    return {
        "jepa/grad_ratio": (jepa.norm() / ce.norm()).item(),
        "jepa/grad_cos": cosine.item(),
        "jepa/effective_rank": describe_states(h.detach())["effective_rank"].item(),
    }


@pytest.mark.parametrize("layer", [-1, 1])
def test_gradients_are_those_of_the_two_losses(corpus: Path, layer: int) -> None:
    config = tiny_config(
        corpus, jepa__layer=layer, monitor__jepa_every=1, train__steps=4, batch__micro=6
    )
    seen = run_ranks(train, 1, config)[0][0]
    expected = first_step_by_hand(config)
    assert 0.01 < expected["jepa/grad_ratio"] < 100
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_ranks_compute_the_diagnostics_together(corpus: Path) -> None:
    """Two ranks of three rows agree with one rank of six in all sums over rows."""
    changes = {"monitor__jepa_every": 1, "train__steps": 4}
    one = run_ranks(train, 1, tiny_config(corpus, batch__micro=6, **changes))[0]
    two = run_ranks(train, 2, tiny_config(corpus, batch__micro=3, **changes))[0]
    for ours, expected in zip(two, one, strict=True):
        for name in ("jepa/grad_ratio", "jepa/grad_cos", "jepa/straightness"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        np.testing.assert_allclose(
            ours["jepa/cos_table"]["cos"], expected["jepa/cos_table"]["cos"], atol=2e-4
        )


@pytest.mark.slow
def test_diagnostics_change_nothing_and_run_when_due(corpus: Path) -> None:
    """Also with padding rows and several micro-batches; steps with diagnostics are logged."""
    changes = {"train__log_every": 7, "jepa__start_frac": 0.2}
    looked = run_ranks(train, 2, tiny_config(corpus, monitor__jepa_every=3, **changes))[0][:-1]
    plain = run_ranks(train, 2, tiny_config(corpus, monitor__jepa_every=0, **changes))[0][:-1]
    assert [r["step"] for r in looked if "jepa/grad_ratio" in r] == [6, 9, 12]
    assert [r["step"] for r in plain] == [7, 12]
    by_step = {record["step"]: record for record in looked}
    assert by_step.keys() == {6, 7, 9, 12}
    for record in plain:
        for key in ("loss/ce", "loss/jepa", "grad_norm", "tokens_digest"):
            assert by_step[record["step"]][key] == record[key]  # bit for bit
    assert not any("jepa/grad_ratio" in record for record in plain)
    assert all(len(json.dumps(record)) < 4000 for record in looked)


@pytest.mark.slow
def test_compiled_graphs_are_the_same(corpus: Path) -> None:
    records, on = run_ranks(count, 2, compiled(corpus, monitor__jepa_every=2))[0]
    off = run_ranks(count, 2, compiled(corpus, monitor__jepa_every=0))[0][1]
    assert sum("jepa/grad_ratio" in record for record in records) == 6
    assert records[-1]["compile/recompiles"] == 0
    assert on == off


def train_cut_off(rank: int, world_size: int, config: Config) -> list[dict[str, Any]]:
    """Train with an objective whose input is detached: a loss, but no gradient."""
    forward = SpanObjective.forward
    SpanObjective.forward = lambda self, states, *rest: forward(  # type: ignore[method-assign]
        self, [h.detach() for h in states], *rest
    )
    return train(rank, world_size, config)


def test_an_objective_without_gradient_is_noticed(corpus: Path) -> None:
    config = tiny_config(corpus, monitor__jepa_every=5)
    records = run_ranks(train_cut_off, 2, config)[0][:-1]
    alarms = JepaAlarms(config.monitor.dead_gradient_ratio, config.monitor.collapse_share)
    warnings = [(record["step"], text) for record in records for text in alarms.observe(record)]
    assert all(record["loss/jepa"] > 0 for record in records)
    assert [step for step, _ in warnings] == [5]
    assert "lambda 0.1" in warnings[0][1]
    assert "does nothing" in warnings[0][1]


# ------------------------------------------------------------------ alarms and images


def record(step: int, ratio: float = 0.1, rank: float = 100.0) -> dict[str, Any]:
    return {
        "step": step, "jepa/lambda": 0.02, "jepa/grad_ratio": ratio, "jepa/effective_rank": rank,
    }  # fmt: skip


def test_alarms_are_raised_once_and_rearm_after_recovery() -> None:
    alarms = JepaAlarms(dead_gradient_ratio=1e-5, collapse_share=0.1)
    course = [
        record(1), record(2, rank=9), record(3, rank=11), record(4, rank=9), {"step": 5},
        record(6, rank=8), record(7, rank=5), record(8), record(9, rank=9),
        record(10, rank=9, ratio=0), record(11, ratio=1e-6), record(12),
        record(13, ratio=1e-6, rank=math.nan),
    ]  # fmt: skip
    warnings = {item["step"]: alarms.observe(item) for item in course}
    assert [step for step, texts in warnings.items() if texts] == [6, 10, 13]
    assert "8.0 directions" in warnings[6][0]
    assert "at step 1 it was 100.0" in warnings[6][0]
    assert len(warnings[10]) == 2
    assert "does nothing" in warnings[13][0]


def test_alarms_keep_their_state_across_a_restart(tmp_path: Path) -> None:
    """The run's records give the first value and the alarms already raised."""
    course = [record(1), record(2, rank=9), record(3, rank=9)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(item) + "\n" for item in course) + '{"step": 4, "je')
    alarms = JepaAlarms(1e-5, 0.1)
    alarms.recall(tmp_path / "none.jsonl")
    alarms.recall(metrics)
    assert alarms.observe(record(4, rank=8)) == []
    assert alarms.observe(record(5, rank=50)) == []
    assert alarms.observe(record(6, rank=8)) == []
    assert len(alarms.observe(record(7, rank=8))) == 1


def test_the_image_shows_signs_and_strength() -> None:
    image = cos_image([[-1.0, 0.0], [1.0, math.nan], [0.5, -0.5]])
    assert image.dtype == np.uint8
    height, width, channels = image.shape
    assert (height * 2, channels) == (width * 3, 3)
    cells = image[:: height // 3, :: width // 2].astype(int)
    red, blue = cells[..., 0], cells[..., 2]
    assert blue[0, 0] > red[0, 0] + 100
    assert red[1, 0] > blue[1, 0] + 100
    assert len({*cells[0, 1]}) == len({*cells[1, 1]}) == 1  # white and grey
    assert red[1, 0] - blue[1, 0] > red[2, 0] - blue[2, 0] > 0
