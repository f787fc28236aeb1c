"""Non-finite losses: skipped on every rank, one roll-back, then the run ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, published
from jepa_dist.checkpoint.manifest import read_manifest, read_state
from jepa_dist.config import Config, to_dict
from jepa_dist.errors import TrainingError
from jepa_dist.parallel.world import start_world
from jepa_dist.run.progress import progress_of
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.listeners import SILENT
from jepa_dist.training.loop import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import STATEFUL, Recorder
from tests.support.tiny import tiny_config, write_corpus

STEPS = 16
RUN = {"train__steps": STEPS, "checkpoint__every": 4, "eval__every": 0}


def poison(trainer: Trainer, samples: range, rank: int, value: float) -> None:
    """Make the loss of some samples non-finite on one rank, in whichever step they occur."""
    plain = trainer.train_step.loss

    def loss(batch, plan, index):
        loss, parts = plain(batch, plan, index)
        progress = trainer.segment.progress
        place = trainer.segment.batches.samples_consumed // 6 * 6
        if place >= progress.skip_start:
            place += progress.skip_count
        if index == 0 and place in samples and trainer.state.world.rank == rank:
            loss = loss * value
            parts = parts | {"ce": parts["ce"] * value}
        return loss, parts

    trainer.train_step = replace(trainer.train_step, loss=loss)


class Reporter(Recorder):
    """Also records roll-backs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def go_back(self, step: int, why: str) -> None:
        self.messages.append(why)
        self.records = [record for record in self.records if record["step"] <= step]


def train(
    rank: int, world_size: int, config: Config, samples: range, poisoned_rank: int, value: float
) -> dict[str, Any]:
    world = start_world(config.parallel)
    checkpointer = Checkpointer(
        Path(config.run.dir) / "checkpoints", world, RetentionPolicy(last=9)
    )
    identity = {"config": to_dict(config), "data_fingerprint": "data"}
    trainer = build_trainer(config, world, checkpointer, None, identity)
    poison(trainer, samples, poisoned_rank, value)
    reporter = Reporter()
    error = None
    try:
        trainer.run(reporter if rank == 0 else SILENT)
    except TrainingError as failure:
        error = failure.problems
    checkpointer.close()
    whole = {name: bool(p.isfinite().all()) for name, p in trainer.state.tensors().items()}
    return {
        "records": reporter.records,
        "messages": reporter.messages,
        "error": error,
        "whole": all(whole.values()),
        "weights": {n: _sum(p) for n, p in trainer.state.model.named_parameters()},
        "skip": trainer.segment.progress.skip,
    }


def _sum(tensor: torch.Tensor) -> float:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return float(local.detach().double().sum())


def config(folder: Path, **changes: Any) -> Config:
    write_corpus(folder)
    return tiny_config(folder, **{**STATEFUL, **RUN, **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_on_every_rank(tmp_path: Path, value: float) -> None:
    settings = config(tmp_path, train__steps=8)
    bad = range(4 * 6, 5 * 6)
    results = run_ranks(train, 2, settings, bad, 1, value)
    assert [result["error"] for result in results] == [None, None]
    assert all(result["whole"] for result in results)
    records = results[0]["records"]
    assert [record["bad_steps"] for record in records] == [0] * 4 + [1] * 4
    assert not torch.tensor(records[4]["grad_norm"]).isfinite()
    assert all(torch.tensor(record["loss/ce"]).isfinite() for record in records[5:])


def losses(rank: int, world_size: int, config: Config, skipped: int) -> list[dict[str, Any]]:
    """Call ``Trainer.step`` in a loop that omits one step's update."""
    world = start_world(config.parallel)
    trainer = build_trainer(config, world)
    optimizer, segment = trainer.state.optimizer, trainer.segment
    plain = optimizer.step
    seen = []
    segment.plans.request(0)
    for step in range(8):
        plan = segment.plans.take()
        segment.plans.request(step + 1)
        optimizer.step = (lambda skip: None) if step == skipped else plain  # type: ignore
        trainer.step(plan)
        segment.drain()
        seen.append(segment.ledger.values["ce"])
    segment.batches.close()
    return seen


def test_skipping_is_as_if_the_optimizer_had_not_been_called(tmp_path: Path) -> None:
    settings = config(tmp_path, train__steps=9, train__max_bad_steps=9)
    expected = run_ranks(losses, 2, settings, 4)[0]
    records = run_ranks(train, 2, settings, range(4 * 6, 5 * 6), 0, float("nan"))[0]["records"]
    seen = [record["loss/ce"] for record in records]
    assert seen[:4] == expected[:4]
    assert seen[5:8] == expected[5:]


def test_it_rolls_back_once_and_skips_the_samples(tmp_path: Path) -> None:
    settings = config(tmp_path, train__max_bad_steps=3)
    bad = range(10 * 6, 15 * 6)
    result, other = run_ranks(train, 2, settings, bad, 1, float("nan"))
    assert (result["error"], other["error"]) == (None, None)
    assert "going back to step 8" in result["messages"][0]
    assert len(result["messages"]) == 1
    # The skipped samples begin at the first bad step and include the two or three steps that were
    # in flight when the third bad one was detected.
    assert result["skip"].start == 60
    assert 78 <= result["skip"].stop <= 96
    assert [record["step"] for record in result["records"]] == list(range(1, STEPS + 1))
    assert all(torch.tensor(record["loss/ce"]).isfinite() for record in result["records"])
    folder = Path(settings.run.dir) / "checkpoints"
    assert list(published(folder)) == [4, 8, 12, 16]
    state = read_state(published(folder)[12])
    assert (state["skip_start"], state["skip_count"]) == (60, len(result["skip"]))


@pytest.mark.slow
def test_after_the_roll_back_it_stops_with_a_report(tmp_path: Path) -> None:
    settings = config(tmp_path, train__max_bad_steps=3)
    results = run_ranks(train, 2, settings, range(60, 10**6), 0, float("nan"))
    for result in results:
        assert "rolled back once already" in result["error"][0]
        assert "samples" in result["error"][1]
        assert result["whole"]
    # Saved again when it rolled back, with the data to pass over; what came later is not healthy.
    paths = published(Path(settings.run.dir) / "checkpoints")
    assert read_state(paths[8])["skip_count"] > 0
    healthy = {step: read_manifest(path).healthy for step, path in paths.items()}
    assert all(healthy[step] == (step <= 8) for step in healthy)


def test_a_run_that_ends_in_skipped_steps_is_not_finished(tmp_path: Path) -> None:
    settings = config(tmp_path, train__steps=8)
    results = run_ranks(train, 2, settings, range(6 * 6, 8 * 6), 1, float("nan"))
    for result in results:
        assert result["error"][0].startswith("the last 2 step(s) of the run were skipped")
        assert "nothing was exported" in result["error"][1]
    path = published(Path(settings.run.dir) / "checkpoints")[8]
    state = read_state(path)
    assert (state["bad_steps"], state["bad_in_row"], state["bad_row_sample"]) == (2, 2, 36)
    assert not read_manifest(path).healthy


def resumed(rank: int, world_size: int, config: Config, at: str, samples: range) -> dict[str, Any]:
    """Resume from a checkpoint, with finite or non-finite losses."""
    world = start_world(config.parallel)
    checkpointer = Checkpointer(
        Path(config.run.dir) / "checkpoints", world, RetentionPolicy(last=9)
    )
    identity = {"config": to_dict(config), "data_fingerprint": "data"}
    trainer = build_trainer(config, world, checkpointer, Path(at), identity)
    poison(trainer, samples, 0, float("nan"))
    reporter = Reporter()
    trainer.run(reporter if rank == 0 else SILENT)
    checkpointer.close()
    return {
        "messages": reporter.messages,
        "skip": trainer.segment.progress.skip,
        "records": reporter.records,
    }


@pytest.mark.slow
def test_consecutive_bad_steps_are_counted_across_restarts(tmp_path: Path) -> None:
    """Two bad steps before the interruption and two after it are four consecutive ones."""
    settings = config(tmp_path, train__max_bad_steps=4, train__stop_at=8)
    bad = range(6 * 6, 14 * 6)
    run_ranks(train, 2, settings, bad, 0, float("nan"))
    path = published(Path(settings.run.dir) / "checkpoints")[8]
    assert read_state(path)["bad_in_row"] == 2
    # Checkpoints of earlier versions do not contain it.
    state = {k: v for k, v in read_state(path).items() if not k.startswith("bad_")}
    assert progress_of(path, state).bad_in_row == 0
    rest = config(tmp_path, train__max_bad_steps=4)
    result = run_ranks(resumed, 2, rest, str(path), bad)[0]
    # The fourth bad step is known only after the steps that were already in flight.
    (message,) = result["messages"]
    assert any(f"not finite for {count} steps in a row: going" in message for count in range(4, 8))
    assert "going back to step 4; samples 36 to" in message
    assert result["skip"].start == 36, "the first bad step of the row, before the interruption"
    assert result["records"][-1]["bad_steps"] >= 4


def test_without_a_healthy_checkpoint_it_stops_at_once(tmp_path: Path) -> None:
    settings = config(tmp_path, train__max_bad_steps=3, checkpoint__every=0)
    results = run_ranks(train, 2, settings, range(10**6), 0, float("nan"))
    assert all("there is no healthy checkpoint" in result["error"][0] for result in results)
