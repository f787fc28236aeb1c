"""The chunked head versus full logits: the same numbers with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_dist.config import Config
from jepa_dist.model import head
from jepa_dist.model.head import HeadRegion, Rows, chunked_loss_sum, loss_sum, num_chunks
from tests.support.graphs import CountingBackend, count
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, train
from tests.support.tiny import tiny_config, write_corpus

VOCAB, WIDTH, ROWS = 1031, 24, 250
CAP = 15.0


@pytest.fixture
def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    weight_N = torch.rand(ROWS, generator=generator)
    weight_N[-40:] = 0.0
    return Rows(
        torch.randn(ROWS, WIDTH, generator=generator),
        torch.randint(VOCAB, (ROWS,), generator=generator),
        weight_N,
    )


@pytest.fixture
def matrix() -> Tensor:
    # Large enough for logits of several times the cap.
    return 3 * torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))


def exact(rows: Rows, head_VE: Tensor, softcap: float, scale: float) -> list[Tensor]:
    """Return loss and gradients in float64, from the definition."""
    y, matrix = (t.double().requires_grad_() for t in (rows.y_NE, head_VE))
    logits = y @ matrix.T
    if softcap > 0:
        logits = softcap * (logits / softcap).tanh()
    chosen = logits.log_softmax(1)[torch.arange(len(y)), rows.targets_N]
    loss = -(rows.weight_N.double() * chosen).sum()
    return [loss, *torch.autograd.grad(scale * loss, [y, matrix])]


def chunked(rows: Rows, head_VE: Tensor, softcap: float, scale: float, chunks: int) -> list[Tensor]:
    y, matrix = (t.clone().requires_grad_() for t in (rows.y_NE, head_VE))
    loss = chunked_loss_sum(rows._replace(y_NE=y), matrix, softcap, chunks)
    return [loss, *torch.autograd.grad(scale * loss, [y, matrix])]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


# 7 leaves a shorter last chunk, 8 is the value in practice, 250 is one row per chunk.
@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 250])
@pytest.mark.parametrize("softcap", [0.0, CAP])
def test_loss_and_gradients_are_exact(
    rows: Rows, matrix: Tensor, softcap: float, chunks: int
) -> None:
    found = chunked(rows, matrix, softcap, 1 / 786432, chunks)
    for ours, expected in zip(found, exact(rows, matrix, softcap, 1 / 786432), strict=True):
        assert error(ours, expected) < 1e-6


def test_without_gradient_it_is_the_same_sum(rows: Rows, matrix: Tensor) -> None:
    with torch.no_grad():
        loss = chunked_loss_sum(rows, matrix, CAP, 7)
    assert not loss.requires_grad
    assert error(loss, exact(rows, matrix, CAP, 1.0)[0]) < 1e-6


def test_rows_of_weight_zero_do_not_count(rows: Rows, matrix: Tensor) -> None:
    other = rows.targets_N.clone()
    other[-40:] = (other[-40:] + 5) % VOCAB
    first = chunked(rows, matrix, CAP, 1.0, 7)
    second = chunked(rows._replace(targets_N=other), matrix, CAP, 1.0, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first[1][-40:].any()
    assert first[1][:-40].any(dim=1).all()


def test_bfloat16_is_about_as_good_as_full_logits(rows: Rows, matrix: Tensor) -> None:
    """Against float64 of the same rounded inputs; a scale that bfloat16 cannot hold."""
    scale = 1 / 786431
    rounded = rows._replace(y_NE=rows.y_NE.bfloat16())
    reference = exact(rounded, matrix.bfloat16(), CAP, scale)
    found = chunked(rounded, matrix.bfloat16(), CAP, scale, 8)
    y, head_VE = (t.clone().requires_grad_() for t in (rounded.y_NE, matrix.bfloat16()))
    loss = loss_sum(rounded._replace(y_NE=y), head_VE, CAP)
    full = [loss, *torch.autograd.grad(scale * loss, [y, head_VE])]
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, theirs, expected in zip(found, full, reference, strict=True):
        # Gradients are rounded once more: a chunk's before the sum, the states' by the scale.
        assert error(ours, expected) < max(1.5 * error(theirs, expected), 1e-6)


def test_the_sum_over_chunks_does_not_lose_small_terms(matrix: Tensor) -> None:
    """The gradient of n equal chunks is n times that of one, in bfloat16 too."""
    generator = torch.Generator().manual_seed(2)
    one = Rows(
        torch.randn(4, WIDTH, generator=generator).bfloat16(),
        torch.randint(VOCAB, (4,), generator=generator),
        torch.ones(4),
    )
    many = Rows(*(t.repeat(512, *[1] * (t.dim() - 1)) for t in one))
    gradient = chunked(one, matrix.bfloat16(), CAP, 1.0, 1)[2]
    assert error(chunked(many, matrix.bfloat16(), CAP, 1.0, 512)[2], 512 * gradient.double()) < 3e-3


class Watch(TorchDispatchMode):
    """Records the largest tensor and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_never_holds_all_logits(rows: Rows, matrix: Tensor) -> None:
    y, head_VE = rows.y_NE.requires_grad_(), matrix.requires_grad_()
    with Watch() as full:
        loss_sum(rows._replace(y_NE=y), head_VE, CAP).backward()
    with Watch() as watch:
        chunked_loss_sum(rows._replace(y_NE=y), head_VE, CAP, 5).backward()
    assert full.largest == ROWS * VOCAB
    assert watch.largest == ROWS * VOCAB / 5
    assert watch.products == 3 * 5


def test_validation_computes_no_gradients(rows: Rows, matrix: Tensor) -> None:
    with torch.no_grad(), Watch() as watch:
        chunked_loss_sum(rows, matrix.requires_grad_(), CAP, 5)
    assert watch.products == 5
    assert watch.largest == ROWS * VOCAB / 5


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "expected"),
    [
        (2048, 257, 1),  # configs/debug.yaml
        (48 * 2048, 257, 1),
        (512, 8192, 2),
        (255, 128256, 1),  # less than the gradient of the matrix
        (8 * 2048, 8192, 8),
        (48 * 2048, 50304, 8),
    ],
)
def test_chosen_by_size(num_rows: int, vocab_size: int, expected: int) -> None:
    assert num_chunks(num_rows, vocab_size) == expected


# ------------------------------------------------------------------ the region


def region(softcap: float = CAP) -> tuple[HeadRegion, list[Any]]:
    """Return a head and inputs large enough for chunks: three rows, one of them padding."""
    generator = torch.Generator().manual_seed(3)
    x_BTD = torch.randn(3, 512, 16, generator=generator).requires_grad_()
    head_VE = torch.randn(4096, 8, generator=generator).requires_grad_()
    proj_ED = torch.randn(8, 16, generator=generator).requires_grad_()
    targets_BT = torch.randint(4096, (3, 512), generator=generator)
    return HeadRegion(softcap), [x_BTD, head_VE, proj_ED, targets_BT, torch.tensor([1.0, 1.0, 0.0])]


def gradients(module: HeadRegion, inputs: list[Any]) -> list[Tensor]:
    loss = module(*inputs)
    loss, *by_row = loss if isinstance(loss, tuple) else [loss]
    return [loss, *torch.autograd.grad(loss / 1024, inputs[:3]), *by_row]


@pytest.mark.parametrize("per_target", [False, True])
def test_region_in_chunks_equals_region_without(
    per_target: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs = region()
    if per_target:
        inputs[4] = torch.rand(3, 512, generator=torch.Generator().manual_seed(4))
    found = gradients(module, inputs)
    monkeypatch.setattr(head, "num_chunks", lambda rows, vocab_size: 1)
    for ours, expected in zip(found, gradients(module, inputs), strict=True):
        assert error(ours, expected.double()) < 1e-6


@pytest.mark.parametrize("chunks", [1, 2])
def test_loss_of_each_row_changes_nothing_else(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64; the sum and the gradients are the same bits as without."""
    monkeypatch.setattr(head, "num_chunks", lambda rows, vocab_size: chunks)
    module, inputs = region()
    expected = gradients(module, inputs)
    module.by_row = True
    *found, loss_B = gradients(module, inputs)
    assert all(map(torch.equal, found, expected))
    assert not loss_B.requires_grad
    x_BTD, head_VE, proj_ED, targets_BT, weight_B = (t.detach().double() for t in inputs)
    y = x_BTD * torch.rsqrt(x_BTD.square().mean(2, keepdim=True) + 1e-7) @ proj_ED.T
    logits = CAP * torch.tanh(y @ head_VE.T / CAP)
    nll_BT = -logits.log_softmax(2).gather(2, targets_BT.long()[..., None]).squeeze(2)
    assert error(loss_B, weight_B * nll_BT.sum(1)) < 1e-6
    with torch.no_grad():
        assert torch.is_tensor(module(*inputs))


@pytest.mark.parametrize("by_row", [False, True])
def test_compiled_is_one_graph_with_and_one_without_gradient(by_row: bool) -> None:
    module, inputs = region()
    module.by_row = by_row
    expected = gradients(module, inputs)
    backend = CountingBackend()
    torch._dynamo.reset()
    module.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        for ours, reference in zip(gradients(module, inputs), expected, strict=True):
            assert error(ours, reference.double()) < 1e-6
        with torch.no_grad():
            assert error(module(*inputs), expected[0].double()) < 1e-6
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """With the real compiler."""
    module, inputs = region()
    expected = gradients(module, inputs)
    module.compile(fullgraph=True, dynamic=False)
    for ours, reference in zip(gradients(module, inputs), expected, strict=True):
        assert error(ours, reference.double()) < 1e-6


# ------------------------------------------------------------------ training with it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train_tokens=9000, val_tokens=1100, num_ids=2039)
    return folder


def large_head(corpus: Path, **changes: Any) -> Config:
    """Return the tiny recipe with a vocabulary and rows for two chunks or more."""
    settings = {
        "data__tokenizer": "null",
        "model__vocab_size": 8192,
        "model__seq_len": 256,
        "model__model_dim": 16,
        "model__num_layers": 2,
        "model__num_loops": 0,
        "model__parallel_residual_start": 1,
        "batch__sequences": 7,
        "batch__micro": 2,
        "train__steps": 2,
    }
    return tiny_config(corpus, **(settings | changes))


def train_with_full_logits(rank: int, world_size: int, config: Config) -> list[dict[str, Any]]:
    head.num_chunks = lambda rows, vocab_size: 1  # type: ignore[assignment]
    return train(rank, world_size, config)


@pytest.mark.parametrize(("world_size", "tied"), [(1, True), (2, True), (2, False)])
def test_runs_are_those_of_full_logits(corpus: Path, world_size: int, tied: bool) -> None:
    """Sharded, accumulated over micro-batches, with padding rows."""
    config = large_head(corpus, model__tie_embeddings=tied)
    assert num_chunks(2 * config.model.seq_len, config.model.vocab_size) == 2
    records = run_ranks(train, world_size, config, timeout=240)[0]
    assert_same_run(records, run_ranks(train_with_full_logits, 1, config, timeout=240)[0])


@pytest.mark.slow
def test_graph_counts_are_those_of_full_logits(corpus: Path) -> None:
    config = large_head(corpus, parallel__compile=True, eval__every=1)
    records, graphs = run_ranks(count, 1, config, timeout=240)[0]
    assert len(graphs) == 2 * 5 + 1
    assert records[-1]["compile/recompiles"] == 0
