"""Exact resume with real processes: a resumed run equals the uninterrupted one."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy
from jepa_dist.config import Config, to_dict
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.listeners import SILENT
from tests.support.ranks import run_ranks
from tests.support.runs import STATEFUL, Recorder, assert_same_run, train_resumable
from tests.support.tiny import tiny_config, write_corpus, write_text_mixture

STEPS = 12
EVAL_EVERY = 5


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


def config(corpus: Path, name: str, **changes: Any) -> Config:
    own = {"run__dir": corpus / name, "train__steps": STEPS, "eval__every": EVAL_EVERY}
    return tiny_config(corpus, **{**STATEFUL, **own, **changes})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run of two ranks, with the same tokens as all others."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return run_ranks(train_resumable, 2, config(folder, "straight"))[0]


def test_bit_for_bit_at_the_same_world_size(corpus: Path, straight: dict[str, Any]) -> None:
    first = run_ranks(train_resumable, 2, config(corpus, "parts", train__stop_at=6))[0]
    assert [r["step"] for r in first["records"]][-1] == 6
    assert not first["records"][-1]["finished"]
    rest = run_ranks(train_resumable, 2, config(corpus, "parts"))[0]
    assert rest["start"].step == 6
    assert rest["records"][-1]["finished"]
    whole = first["records"][:-1] + rest["records"][:-1]
    expected = straight["records"][:-1]
    assert [r["step"] for r in whole] == [r["step"] for r in expected] == list(range(1, STEPS + 1))
    same = ("loss/ce", "loss/jepa", "grad_norm", "val/loss", "tokens_digest", "phase", "lr/matrix")
    for ours, reference in zip(whole, expected, strict=True):
        for key in same:
            assert ours.get(key) == reference.get(key), (ours["step"], key)
    assert rest["samples"] == straight["samples"]
    assert rest["state"].keys() == straight["state"].keys()
    for name, tensor in straight["state"].items():
        assert torch.equal(rest["state"][name], tensor), name


@pytest.mark.slow
def test_a_mixture_resumes_at_another_world_size(tmp_path: Path) -> None:
    """Before and after the mixture weights change (step 4), with a tokenizer.json."""
    pytest.importorskip("tokenizers")
    mixed = write_text_mixture(tmp_path)
    straight = run_ranks(train_resumable, 1, config(tmp_path, "straight", **mixed))[0]
    first = run_ranks(train_resumable, 2, config(tmp_path, "parts", **mixed, train__stop_at=3))[0]
    rest = run_ranks(train_resumable, 1, config(tmp_path, "parts", **mixed))[0]
    assert_same_run([*first["records"][:-1], *rest["records"]], straight["records"])
    assert rest["samples"] == straight["samples"]


@pytest.mark.slow
def test_the_world_size_may_change_at_every_start(corpus: Path) -> None:
    span = {"jepa__objective": "span"}
    straight = run_ranks(train_resumable, 1, config(corpus, "straight", **span))[0]["records"]
    records: list[dict[str, Any]] = []
    for world_size, stop_at in ((4, 3), (2, 6), (3, 9), (1, None)):
        changes = span | ({} if stop_at is None else {"train__stop_at": stop_at})
        part = run_ranks(train_resumable, world_size, config(corpus, "parts", **changes))[0]
        records += part["records"][:-1]
    assert_same_run([*records, part["records"][-1]], straight)


def test_the_clock_of_a_timed_run_continues(corpus: Path) -> None:
    timed = {"train__max_wallclock_seconds": 1000}
    first = run_ranks(train_resumable, 1, config(corpus, "run", train__stop_at=5, **timed))[0][
        "records"
    ]
    rest = run_ranks(train_resumable, 1, config(corpus, "run", train__stop_at=8, **timed))[0][
        "records"
    ]
    progress = [record["progress"] for record in [*first[:-1], *rest[:-1]]]
    assert len(progress) == 8
    assert all(later > earlier > 0 for earlier, later in pairwise(progress))


@pytest.mark.slow
def test_mesh_and_jepa_may_change_and_changes_are_printed(corpus: Path) -> None:
    run_ranks(train_resumable, 2, config(corpus, "run", train__stop_at=5, jepa__objective="span"))
    changes = {"parallel__dp_replicate": 2, "jepa__lambda": 0.3}
    part = run_ranks(train_resumable, 4, config(corpus, "run", **changes))[0]
    assert part["start"].step == 5
    messages = "\n".join(part["start"].messages)
    assert "jepa.objective: was 'span', is 'next_state'" in messages
    assert "jepa.lambda: was 0.1, is 0.3" in messages
    assert "parallel.dp_replicate: was 1, is 2" in messages


@pytest.mark.parametrize(
    ("changes", "fingerprint", "message"),
    [
        ({"model__num_layers": 5}, "data", r"model\.num_layers: was 4, is 5"),
        ({"seed": 7}, "data", r"seed: was 0, is 7"),
        ({}, "other", r"data\.train: not the shards"),
    ],
)
def test_another_run_is_refused(corpus: Path, changes, fingerprint, message) -> None:
    run_ranks(train_resumable, 1, config(corpus, "run", train__stop_at=2))
    with pytest.raises(RuntimeError, match=message):
        run_ranks(train_resumable, 1, config(corpus, "run", **changes), fingerprint)
    allowed = config(corpus, "run", checkpoint__allow_other_data=True, train__stop_at=3)
    if fingerprint == "other":
        assert run_ranks(train_resumable, 1, allowed, fingerprint)[0]["start"].step == 2


def test_a_damaged_checkpoint_is_reported_and_an_earlier_one_loaded(corpus: Path) -> None:
    run_ranks(train_resumable, 2, config(corpus, "run", train__stop_at=4, checkpoint__every=2))
    folder = corpus / "run" / "checkpoints"
    shard = next((folder / "step_00000004").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    part = run_ranks(train_resumable, 2, config(corpus, "run", train__stop_at=6))[0]
    assert part["start"].step == 2
    assert "step_00000004: skipped" in part["start"].messages[0]


def test_branching_from_a_checkpoint(corpus: Path) -> None:
    run_ranks(train_resumable, 2, config(corpus, "run", train__stop_at=4))
    source = corpus / "run" / "checkpoints" / "step_00000004"
    branch = config(corpus, "branch", checkpoint__resume=source, train__stop_at=6)
    assert run_ranks(train_resumable, 2, branch)[0]["start"].step == 4
    assert (corpus / "branch" / "checkpoints" / "step_00000006").is_dir()


def test_never_refuses_an_occupied_directory(corpus: Path) -> None:
    run_ranks(train_resumable, 1, config(corpus, "run", train__stop_at=2))
    with pytest.raises(RuntimeError, match="exists already and is not overwritten"):
        run_ranks(train_resumable, 1, config(corpus, "run", checkpoint__resume="never"))


def test_a_foreign_directory_is_refused(corpus: Path) -> None:
    (corpus / "run").mkdir()
    (corpus / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(RuntimeError, match="holds no checkpoint and was not made by this"):
        run_ranks(train_resumable, 1, config(corpus, "run"))


def stop_while_evaluating(
    rank: int, world_size: int, config: Config, evaluation: int
) -> dict[str, Any]:
    """Rank 1 is asked to stop when the given evaluation begins."""
    world = start_world(config.parallel)
    checkpointer = Checkpointer(
        Path(config.run.dir) / "checkpoints", world, RetentionPolicy(last=2)
    )
    identity = {"config": to_dict(config), "data_fingerprint": "data"}
    trainer = build_trainer(config, world, checkpointer, None, identity)
    validation, stops = trainer.evaluation.validation, trainer.evaluation.stops
    plain, begun = validation.run, []

    def run(*args: Any) -> Any:
        begun.append(1)
        if len(begun) == evaluation and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not stops.is_received:
                time.sleep(0.01)
        return plain(*args)

    validation.run = run  # type: ignore[method-assign]
    recorder = Recorder()
    outcome = trainer.run(recorder if rank == 0 else SILENT)
    checkpointer.close()
    return {"records": recorder.records, "summary": outcome.summary()}


def test_a_stop_cancels_an_evaluation(corpus: Path, straight: dict[str, Any]) -> None:
    result = run_ranks(stop_while_evaluating, 2, config(corpus, "stopped"), 1)[0]
    summary = result["summary"]
    assert not summary["finished"]
    assert summary["saved"]
    assert "asked to stop" in summary["reason"]
    assert summary["step"] <= EVAL_EVERY + 2
    assert all("val/loss" not in record for record in result["records"])
    rest = run_ranks(train_resumable, 2, config(corpus, "stopped"))[0]
    assert rest["records"][-1]["val/loss"] == straight["records"][-1]["val/loss"]


@pytest.mark.slow
def test_a_stop_during_the_last_evaluation_leaves_it_to_the_next_start(
    corpus: Path, straight: dict[str, Any]
) -> None:
    last = STEPS // EVAL_EVERY + 1
    summary = run_ranks(stop_while_evaluating, 2, config(corpus, "stopped"), last)[0]["summary"]
    assert (summary["step"], summary["finished"]) == (STEPS, False)
    rest = run_ranks(train_resumable, 2, config(corpus, "stopped"))[0]
    assert rest["start"].step == STEPS
    assert rest["records"][-1]["finished"]
    for key in ("val/loss", "val/ema_loss", "tokens_digest", "spans_digest"):
        assert rest["records"][-1][key] == straight["records"][-1][key], key


def stop_while_compiling(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """Rank 0 is asked to stop while the first variant of the model is compiled."""
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: plain(self, backend="eager", **options)
    world = start_world(config.parallel)
    checkpointer = Checkpointer(
        Path(config.run.dir) / "checkpoints", world, RetentionPolicy(last=2)
    )
    warm_up = (trainer := build_trainer(config, world, checkpointer)).warm_up
    compiled: list[int] = []
    plain_compile = warm_up.compile

    def compile_and_stop(phase: int, weight: float) -> None:
        plain_compile(phase, weight)
        compiled.append(phase)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            while not warm_up.stops.is_received:
                time.sleep(0.01)

    warm_up.compile = compile_and_stop  # type: ignore[method-assign]
    outcome = trainer.run()
    checkpointer.close()
    return {"compiled": len(compiled), "summary": outcome.summary()}


def test_a_stop_during_the_warm_up_ends_it(corpus: Path) -> None:
    warming = config(corpus, "warming", parallel__compile=True, parallel__compile_warmup=True)
    first, second = run_ranks(stop_while_compiling, 2, warming)
    assert (first["compiled"], second["compiled"]) == (1, 0)  # the second rank waited for the first
    for result in (first, second):
        summary = result["summary"]
        assert (summary["step"], summary["finished"], summary["saved"]) == (0, False, False)
        assert "before the first step" in summary["reason"]
