"""The CUDA path: NCCL beside gloo, bf16 compute, compiled regions. ``pytest -m gpu``.

``GPU_TESTS_ON_CPU=1 pytest -m gpu tests/test_gpu.py`` tries out, without a GPU, all tests but those
marked ``cuda_only``.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, published
from jepa_dist.config import Config, to_dict
from jepa_dist.data.shards import read_shard, write_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.generate import generate
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import causal_attention
from jepa_dist.monitor.device_memory import explain_out_of_memory
from jepa_dist.optim.histograms import Distribution
from jepa_dist.parallel.attention import bind_attention
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.plan import StepPlan
from jepa_dist.process.signals import STOP_SIGNALS
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.loop import Trainer
from tests.support.patience import patience
from tests.support.runs import Recorder
from tests.support.tiny import tiny_config, write_corpus

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_CUDA and os.environ.get("GPU_TESTS_ON_CPU") != "1", reason="needs a CUDA device"
    ),
]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


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
        build_trainer(config, start_world(config.parallel)).run(recorder)
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


@cuda_only
def test_only_logged_steps_wait_for_the_device(corpus: Path) -> None:
    config = tiny_config(
        corpus, train__steps=20, train__log_every=10, optim__matrix="muon", eval__every=0
    )
    try:
        trainer = build_trainer(config, start_world(config.parallel))
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
        trainer.run()
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


@cuda_only
def test_device_numbers_are_reported(corpus: Path) -> None:
    record = train(tiny_config(corpus, train__steps=3))[-1]
    assert record["memory/device_peak_gib"] > 0


# ------------------------------------------------------------------ compiled in bfloat16


@pytest.mark.timeout(900)  # where a CPU compiles
def test_compiled_follows_eager_in_bfloat16(corpus: Path) -> None:
    """With the objective on from the first step, so that it is compiled. No validation, whose
    graphs are others."""
    rounded = {"parallel__precision": "bfloat16", "train__stop_at": 5, "optim__matrix": "muon"}
    eager = train(tiny_config(corpus, **rounded))
    compiled = train(tiny_config(corpus, parallel__compile=True, **rounded))
    assert [r["tokens_digest"] for r in compiled] == [r["tokens_digest"] for r in eager]
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours["loss/ce"] == pytest.approx(expected["loss/ce"], rel=1e-2)
        assert ours["loss/jepa"] == pytest.approx(expected["loss/jepa"], rel=5e-2)


# ------------------------------------------------------------------ attention


def write_documents(folder: Path) -> None:
    """Write the corpus with documents of 1 to 20 tokens; id 7 begins them."""
    write_corpus(folder)
    generator = np.random.Generator(np.random.PCG64(0))
    for path in folder.glob("*.bin"):
        ids = np.array(read_shard(path))
        ids[np.cumsum(generator.integers(1, 21, ids.size // 21))] = 7
        write_shard(path, ids)


@cuda_only
@pytest.mark.parametrize(
    ("attention", "compiled"),
    [("efficient", True), ("flex", True), ("auto", True), ("auto", False)],
)
def test_masked_documents_train_as_with_full_probabilities(
    tmp_path: Path, attention: str, compiled: bool
) -> None:
    """In bfloat16; ``auto`` is FlexAttention in compiled regions, where the mask changes with each
    batch and must recompile nothing."""
    write_documents(tmp_path)
    wide = {"model__model_dim": 64, "jepa__within_documents": True, "data__bos_id": 7}
    masked = {"model__document_mask": True, "model__reset_positions": True, **wide}
    expected = train(tiny_config(tmp_path, parallel__attention="math", **masked))
    kernel = {"parallel__attention": attention, "parallel__compile": compiled}
    config = tiny_config(tmp_path, **masked, **kernel)
    records = train(config)
    assert len(records) == len(expected) == config.train.steps
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss/ce"] == pytest.approx(theirs["loss/ce"], rel=2e-2)
    if compiled:
        assert records[-1]["compile/recompiles"] == 0


@cuda_only
@pytest.mark.parametrize("documents", [False, True])
def test_flex_and_its_gradients_equal_full_probabilities(documents: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 256, 32) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    starts = torch.rand(2, 256, generator=generator) < 0.05
    numbers = starts.cumsum(1).to(DEVICE) if documents else None

    def results(name: str) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        attend = torch.compile(bind_attention(causal_attention, name), fullgraph=True)
        found = attend(q, k, v, numbers)
        found.square().sum().backward()
        return [found, *(x.grad for x in (q, k, v))]

    for ours, expected in zip(results("flex"), results("math"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


@cuda_only
def test_deterministic_runs_are_equal_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """In separate processes: the switch cannot be reset."""
    settings = {"parallel__deterministic": True, "parallel__compile": True}
    losses = []
    for name in ("first", "again"):
        changes = {"run__dir": tmp_path / name, "optim__matrix": "muon", **settings}
        config = tiny_config(corpus, **changes)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(to_dict(config)))
        command = [sys.executable, "-m", "jepa_dist.train", str(file)]
        subprocess.run(command, check=True, timeout=patience(120))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss/total") for line in lines])
        assert len(losses[-1]) >= config.train.steps
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "objective",
    [
        {"jepa__objective": "next_state", "jepa__next_state__head": "linear"},
        {"jepa__objective": "next_state", "jepa__next_state__head": "swiglu"},
        {"jepa__objective": "next_latent"},
    ],
    ids=["linear", "swiglu", "next_latent"],
)
def test_objectives_with_parameters_compiled_follow_eager(
    corpus: Path, objective: dict[str, str]
) -> None:
    eager = train(tiny_config(corpus, train__steps=8, **objective))
    compiled = train(tiny_config(corpus, train__steps=8, parallel__compile=True, **objective))
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours["loss/ce"] == pytest.approx(expected["loss/ce"], rel=2e-2)
        assert ours["loss/jepa"] == pytest.approx(expected["loss/jepa"], rel=5e-2)


# ------------------------------------------------------------------ save and resume


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the signal handlers that a trainer with checkpoints replaces."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors in full, on the CPU."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone()
        for name, t in trainer.state.tensors().items()
    }


def train_resumable(
    config: Config, resume: Path | None = None
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
    """Records, and the state before the first step and after the last."""
    recorder, identity = Recorder(), {"config": to_dict(config), "data_fingerprint": "data"}
    world = start_world(config.parallel)
    try:
        checkpointer = Checkpointer(
            Path(config.run.dir) / "checkpoints", world, RetentionPolicy(last=2)
        )
        trainer = build_trainer(config, world, checkpointer, resume, identity)
        before = state_of(trainer)
        trainer.run(recorder)
        checkpointer.close()
        return recorder.records, before, state_of(trainer)
    finally:
        stop_world()


@pytest.mark.usefixtures("signals")
def test_a_resumed_run_begins_exactly_where_it_stopped(corpus: Path, tmp_path: Path) -> None:
    """Restored state is exact; later steps as far as kernels are deterministic."""
    recipe = {"optim__matrix": "muon", "optim__ema_decay": 0.9, "eval__every": 6}
    straight, *_ = train_resumable(tiny_config(corpus, run__dir=tmp_path / "straight", **recipe))
    parts = tmp_path / "parts"
    first, _, saved = train_resumable(
        tiny_config(corpus, run__dir=parts, train__stop_at=9, **recipe)
    )
    (checkpoint,) = published(parts / "checkpoints").values()
    rest, restored, _ = train_resumable(tiny_config(corpus, run__dir=parts, **recipe), checkpoint)
    assert restored.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(restored[name], saved[name])] == []
    both = [*first, *rest]
    assert [r["step"] for r in both] == [r["step"] for r in straight]
    assert [r["tokens_digest"] for r in both] == [r["tokens_digest"] for r in straight]
    assert [r["spans_digest"] for r in both] == [r["spans_digest"] for r in straight]
    for ours, expected in zip(both, straight, strict=True):
        limit = 1e-2 if ON_CUDA else 1e-6
        assert ours["loss/total"] == pytest.approx(expected["loss/total"], rel=limit)
    assert rest[-1]["val/loss"] == pytest.approx(straight[-1]["val/loss"], rel=1e-2)


# ------------------------------------------------------------------ what is looked at


class Watcher(Recorder):
    """Also records the histograms, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.distributions: dict[int, Mapping[str, Distribution]] = {}

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        self.distributions[step] = values


def test_histograms_and_probes(corpus: Path) -> None:
    config = tiny_config(
        corpus,
        train__steps=4,
        train__log_every=100,
        monitor__histogram_every=2,
        monitor__jepa_every=2,
        optim__matrix="muon",
    )
    watcher = Watcher()
    try:
        trainer = build_trainer(config, start_world(config.parallel))
        sizes = {name: p.numel() for name, p in trainer.state.model.named_parameters()}
        trainer.run(watcher)
    finally:
        stop_world()
    assert list(watcher.distributions) == [2, 4]
    for found in watcher.distributions.values():
        assert found.keys() == {f"{kind}/{n}" for n in sizes for kind in ("weights", "gradients")}
        for name, distribution in found.items():
            assert distribution.num == sum(distribution.counts) == sizes[name.partition("/")[2]]
            assert distribution.minimum <= distribution.maximum
    probed = [record for record in watcher.records if "jepa/grad_ratio" in record]
    assert [record["step"] for record in probed] == [2, 4]
    for record in probed:
        assert record["jepa/grad_ratio"] > 0
        assert -1 <= record["jepa/grad_cos"] <= 1


@cuda_only
def test_memory_snapshots(corpus: Path, tmp_path: Path) -> None:
    try:
        with explain_out_of_memory(tmp_path / "end", 0, snapshot=True):
            train(tiny_config(corpus, train__steps=2))
        with (
            pytest.raises(UserError, match=r"lower batch\.micro"),
            explain_out_of_memory(tmp_path / "full", 0, snapshot=True),
        ):
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    for folder in ("end", "full"):
        assert (tmp_path / folder / "profile" / "memory_rank_0.pickle").stat().st_size > 1000


# ------------------------------------------------------------------ generation


def written(model: GPT, device: torch.device, **changes: Any) -> str:
    options: dict[str, Any] = {"num_tokens": 30, "temperature": 0.0, "seed": 3, "phase": 2}
    tokenizer = load_tokenizer("bytes")
    return generate(model, tokenizer, "def", device=device, **{**options, **changes})


def trained_and_then(config: Config, look: Callable[[Trainer], Any]) -> Any:
    try:
        trainer = build_trainer(config, start_world(config.parallel))
        trainer.run()
        return look(trainer)
    finally:
        stop_world()


def test_a_trained_model_generates_on_the_device(corpus: Path) -> None:
    config = tiny_config(corpus, train__steps=8, optim__matrix_lr=0.02, optim__embed_lr=0.3)

    def look(trainer: Trainer) -> tuple[list[str], GPT]:
        texts = [written(trainer.state.root, DEVICE, temperature=1.0) for _ in range(2)]
        trainer.state.schedule.release()
        weights = {name: p.full_tensor() for name, p in trainer.state.model.named_parameters()}
        plain = GPT(config.model)
        plain.load_state_dict({name: value.detach().cpu() for name, value in weights.items()})
        return texts, plain

    (text, again), plain = trained_and_then(config, look)
    assert text == again
    assert text.startswith("def")
    assert len(text) > len("def")
    # In float32 the likeliest tokens are those that the CPU finds.
    on_device = copy.deepcopy(plain).to(DEVICE)
    assert written(on_device, DEVICE) == written(plain, torch.device("cpu"))
