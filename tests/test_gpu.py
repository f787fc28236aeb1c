"""The CUDA path: NCCL beside gloo, bf16 compute, compiled regions. ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.config import Config
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.plan import StepPlan
from jepa_dist.trainer import Trainer
from tests.test_world_sizes import Recorder
from tests.tiny import tiny_config, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def train(config: Config) -> list[dict[str, Any]]:
    recorder = Recorder()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        Trainer(config, start_world(config.parallel)).run(recorder)  # type: ignore[arg-type]
    finally:
        stop_world()
    return recorder.records


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_bfloat16_follows_float32(corpus: Path, matrix: str) -> None:
    exact = train(tiny_config(corpus, parallel__precision="float32", optim__matrix=matrix))
    rounded = train(tiny_config(corpus, optim__matrix=matrix))
    assert [r["tokens_digest"] for r in rounded] == [r["tokens_digest"] for r in exact]
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours["loss/ce"] == pytest.approx(expected["loss/ce"], rel=3e-2)
    assert rounded[-1]["loss/ce"] < rounded[0]["loss/ce"] - 0.1


def test_only_logged_steps_wait_for_the_device(corpus: Path) -> None:
    config = tiny_config(corpus, train__log_every=10, optim__matrix="muon", eval__every=0)
    try:
        trainer = Trainer(config, start_world(config.parallel))
        plain, watched = trainer.step, []

        def step(plan: StepPlan) -> None:
            if plan.step < 2 or plan.log:
                return plain(plan)
            watched.append(plan.step)
            torch.cuda.set_sync_debug_mode("error")
            try:
                plain(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        trainer.step = step  # type: ignore[method-assign]
        trainer.run(None)
    finally:
        stop_world()
    assert len(watched) > 10


def test_compiled_equals_eager_and_never_recompiles(corpus: Path) -> None:
    precise = {"parallel__precision": "float32"}
    eager = train(tiny_config(corpus, **precise))
    compiled = train(tiny_config(corpus, parallel__compile=True, **precise))
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-4)
    assert compiled[-1]["compile/recompiles"] == 0
    assert compiled[-1]["compile/graphs"] == 2 * 5 + 1


def test_everything_is_compiled_by_the_warm_up(corpus: Path) -> None:
    config = tiny_config(
        corpus, parallel__compile=True, parallel__compile_warmup=True, eval__every=5
    )
    records = train(config)
    assert len({record["compile/graphs"] for record in records}) == 1
    assert records[-1]["compile/recompiles"] == 0


def test_device_numbers_are_reported(corpus: Path) -> None:
    record = train(tiny_config(corpus, train__steps=3))[-1]
    assert record["memory/device_peak_gib"] > 0
