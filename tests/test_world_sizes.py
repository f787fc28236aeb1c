"""World-size invariance on real gloo ranks: a step does not depend on how many ranks compute it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from jepa_dist.config import Config
from jepa_dist.data.loader import Batch
from jepa_dist.data.sources import training_order
from jepa_dist.parallel.world import start_world
from jepa_dist.plan import Planner, StepPlan, TrainingClock
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.step import Loss
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, train
from tests.support.tiny import tiny_config, write_corpus, write_text_mixture

STEPS = 9  # through all phases


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def single(corpus: Path) -> list[dict[str, Any]]:
    return run_ranks(train, 1, tiny_config(corpus, train__steps=STEPS))[0]


def test_the_single_run_covers_all_phases_and_learns(single: list[dict[str, Any]]) -> None:
    assert {record["phase"] for record in single} == {0, 1, 2}
    assert single[-1]["loss/ce"] < single[0]["loss/ce"] - 0.05
    assert all(record["loss/jepa"] is not None for record in single)
    assert len({record["tokens_digest"] for record in single[:-1]}) == STEPS


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_world_sizes_agree(world_size: int, corpus: Path, single) -> None:
    """6 sequences on 4 ranks do not divide: 1, 2, 1 and 2, in micro-batches of at most 2."""
    config = tiny_config(corpus, train__steps=STEPS)
    assert_same_run(run_ranks(train, world_size, config)[0], single)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(4, {"parallel__dp_replicate": 2}, id="hsdp-2x2"),
        pytest.param(2, {"parallel__dp_replicate": 2}, id="replication"),
        pytest.param(2, {"batch__micro": 1}, id="accumulation"),
        pytest.param(
            2,
            {"batch__micro": 1, "parallel__reshard_after_forward": False},
            id="accumulation-kept-gathered",
        ),
        pytest.param(
            2, {"batch__micro": 1, "parallel__accumulate": "sharded"}, id="accumulation-sharded"
        ),
        pytest.param(
            4,
            {"batch__micro": 1, "parallel__accumulate": "sharded", "parallel__dp_replicate": 2},
            id="accumulation-sharded-hsdp-2x2",
        ),
        pytest.param(2, {"parallel__keep_looped_gathered": False}, id="looped-gathered-again"),
        pytest.param(2, {"parallel__blocks_per_unit": 4, "batch__micro": 1}, id="one-unit"),
        pytest.param(
            4,
            {
                "parallel__blocks_per_unit": 2,
                "parallel__dp_replicate": 2,
                "parallel__activation_checkpointing": "full",
                "batch__micro": 1,
                "parallel__accumulate": "sharded",
            },
            id="units-of-two-hsdp-2x2",
        ),
        pytest.param(2, {"parallel__activation_checkpointing": "full"}, id="checkpointing-full"),
        pytest.param(
            2, {"parallel__activation_checkpointing": "selective"}, id="checkpointing-selective"
        ),
        pytest.param(2, {"data__workers": 2}, id="loader-processes"),
    ],
)
def test_layouts_agree(world_size: int, changes: dict[str, Any], corpus: Path, single) -> None:
    config = tiny_config(corpus, train__steps=STEPS, **changes)
    assert_same_run(run_ranks(train, world_size, config)[0], single)


def test_mixtures_agree(tmp_path: Path) -> None:
    """Two sources whose weights change, with a tokenizer.json."""
    pytest.importorskip("tokenizers")
    mixed = {**write_text_mixture(tmp_path), "eval__every": 4}
    reference = run_ranks(train, 1, tiny_config(tmp_path, **mixed))[0]
    ours = run_ranks(train, 3, tiny_config(tmp_path, **mixed, data__workers=1))[0]
    assert_same_run(ours, reference)
    assert [record["mixture/share/walk"] for record in ours[:8]] == [0.7] * 4 + [0.25] * 4
    for name in ("walk", "other"):
        for key in (f"val/loss/{name}", f"val/bpb/{name}"):
            assert ours[-1][key] == pytest.approx(reference[-1][key], rel=1e-5)
    drawn = training_order(tiny_config(tmp_path, **mixed)).draw(np.arange(48))[0].reshape(8, 6)
    for record, same, sources in zip(ours[:8], reference[:8], drawn, strict=True):
        losses = [record[f"loss/ce/{name}"] for name in ("walk", "other")]
        assert losses == pytest.approx(
            [same[f"loss/ce/{name}"] for name in ("walk", "other")], rel=1e-5
        )
        counts = np.bincount(sources, minlength=2)
        assert [loss is None for loss in losses] == [count == 0 for count in counts]
        total = sum(count * (loss or 0) for count, loss in zip(counts, losses, strict=True))
        assert record["loss/ce"] == pytest.approx(total / 6, rel=1e-5)
    parts = [ours[-1][f"val/loss/{name}"] for name in ("walk", "other")]
    assert min(parts) < ours[-1]["val/loss"] < max(parts)


@pytest.mark.parametrize(
    ("objective", "layer"), [("span", 1), ("next_state", 1), ("next_latent", -1)]
)
def test_muon_and_untied_parts_agree(objective: str, layer: int, corpus: Path) -> None:
    changes = {
        "jepa__objective": objective,
        "optim__matrix": "muon",
        "optim__matrix_lr": 0.005,
        "model__tie_embeddings": False,
        "model__embedding_dim": 20,
        "model__untie_loop_mlps": True,
        "jepa__layer": layer,
        "jepa__spans_per_sequence": 3,
        "jepa__start_frac": 0.2,
        "jepa__ramp_frac": 0.4,
    }
    config = tiny_config(corpus, train__steps=STEPS, **changes)
    reference = run_ranks(train, 1, config)[0]
    assert reference[0]["loss/jepa"] is None
    assert reference[-1]["loss/jepa"] is not None
    assert_same_run(run_ranks(train, 3, config)[0], reference)
    replicas = {"parallel__dp_replicate": 2, "parallel__accumulate": "sharded", "batch__micro": 1}
    config = tiny_config(corpus, train__steps=STEPS, **changes, **replicas)
    assert_same_run(run_ranks(train, 4, config)[0], reference)


# ------------------------------------------------------------------ gradients


class JepaAlone:
    """The objective without cross-entropy and without its weight."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(
        self, batch: Batch, plan: StepPlan, index: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        _, parts = self._loss(batch, plan, index)
        return parts["jepa"], parts


def first_gradients(rank: int, world_size: int, config: Config) -> dict[str, torch.Tensor]:
    """Return the full gradients of the first step's JEPA loss alone."""
    trainer = build_trainer(config, start_world(config.parallel))
    plan = Planner(config, TrainingClock()).plan(0)
    replace(trainer.train_step, loss=JepaAlone(trainer.train_step.loss)).accumulate(
        trainer.segment.batches, plan
    )
    full = {}
    for name, parameter in trainer.state.model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            full[name] = parameter.grad.full_tensor().clone()
    dist.barrier()
    return full


def test_local_jepa_gradients_add_up_to_the_global_one(corpus: Path) -> None:
    config = tiny_config(corpus)
    expected = run_ranks(first_gradients, 1, config)[0]
    ours = run_ranks(first_gradients, 4, config)[0]
    assert ours.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * scale, name


def test_initial_weights_do_not_depend_on_the_world_size(corpus: Path) -> None:
    one, three = (run_ranks(initial_weights, n, tiny_config(corpus))[0] for n in (1, 3))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


def initial_weights(rank: int, world_size: int, config: Config) -> dict[str, torch.Tensor]:
    model = build_trainer(config, start_world(config.parallel)).state.model
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
