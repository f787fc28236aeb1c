"""``model.document_mask``: a packed row gives the results of its documents, each run alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jepa_dist
from jepa_dist.build import chosen_attention
from jepa_dist.config import Config, ModelConfig, ParallelConfig, check, load
from jepa_dist.data.check import check_data, with_bos
from jepa_dist.data.shards import write_shard
from jepa_dist.errors import UserError
from jepa_dist.interop.parameter_golf import settings_of
from jepa_dist.model.cache import KVCache
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import causal_attention
from jepa_dist.parallel.attention import bind_attention
from tests.support.graphs import count
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, train
from tests.support.tiny import tiny_config, tiny_overrides
from tests.support.trained_run import PHASE, noisy_model, save_checkpoint

BOS = 7
CPU = torch.device("cpu")


def masked(folder: Path, *, reset: bool = True, **changes: Any) -> Config:
    """Return the tiny recipe with every feature of the model, and masked documents."""
    mask = {"model__document_mask": True, "model__reset_positions": reset}
    given = {"data__bos_id": BOS, "jepa__within_documents": True, **mask, **changes}
    return tiny_config(folder, **given)


def model_of(config: Config) -> GPT:
    model = noisy_model(config)
    model.bos_id = BOS
    return model.double()


def packed(length: int, *starts: int) -> Tensor:
    """Return a row with documents from ``starts``; without 0, the first one began before."""
    ids = torch.randint(8, 61, (length,), generator=torch.Generator().manual_seed(length))
    ids[list(starts)] = BOS
    return ids


def documents(row: Tensor) -> list[Tensor]:
    cuts = sorted({0, *(row == BOS).nonzero().flatten().tolist(), len(row)})
    return [row[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("phase", [0, 2])
def test_a_packed_row_equals_its_documents_run_alone(
    tmp_path: Path, reset: bool, phase: int
) -> None:
    """With and without reset_positions: rotary attention depends on distances only."""
    config = masked(tmp_path, reset=reset)
    model = model_of(config)
    rows = [packed(24, 0, 5, 6, 17), packed(24, 9), packed(24, 23), packed(24)]
    found = model(torch.stack(rows), phase=phase, taps=(1, -1))
    for number, row in enumerate(rows):
        alone = [model(document[None], phase=phase, taps=(1, -1)) for document in documents(row)]
        expected = torch.cat([output.logits_BTV[0] for output in alone])
        torch.testing.assert_close(found.logits_BTV[number], expected, rtol=0, atol=1e-5)
        for tap in (0, 1):
            states = torch.cat([output.taps[tap][0] for output in alone])
            torch.testing.assert_close(found.taps[tap][number], states, rtol=1e-6, atol=1e-5)


def test_without_the_mask_attention_crosses_documents(tmp_path: Path) -> None:
    config = masked(tmp_path)
    model = model_of(config)
    row = packed(24, 0, 9)[None]
    with_mask = model(row).logits_BTV
    model.config = config.model.model_copy(update={"document_mask": False})
    without = model(row).logits_BTV
    torch.testing.assert_close(with_mask[:, :9], without[:, :9])
    assert (with_mask[:, 9:] - without[:, 9:]).abs().max() > 0.01


def test_no_gradient_crosses_a_boundary(tmp_path: Path) -> None:
    model = model_of(masked(tmp_path))
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.embed.register_forward_hook(keep)
    row = packed(24, 0, 9, 15)
    logits = model(row[None], phase=2).logits_BTV
    logits[0, 9:15].square().sum().backward()
    gradient = embedded[0].grad[0].abs().sum(-1)
    assert (gradient[9:15] > 0).all()
    assert gradient[:9].max() == gradient[15:].max() == 0


def test_cached_passes_equal_one_pass(tmp_path: Path) -> None:
    """A document that begins in the middle, in a prompt and after it, in one row of two."""
    model = model_of(masked(tmp_path))
    rows = torch.stack([packed(20, 0, 4, 11), packed(20, 15)])
    whole = model(rows, phase=2).logits_BTV
    cache = KVCache(model.config, phase=2, length=20, batch=2)
    bounds = [0, *range(6, 21)]
    parts = [
        model(rows[:, start:end], phase=2, cache=cache).logits_BTV
        for start, end in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("name", ["flash", "math", "efficient"])
def test_kernels_agree(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 32, 16), (2, 2, 32, 16), (2, 2, 32, 16)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    numbers = torch.stack([torch.arange(32) // 9, torch.arange(32) // 32])
    groups = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    scores = q @ groups[0].transpose(-1, -2) / 16**0.5
    seen = torch.ones(32, 32).tril().bool() & (numbers[:, :, None] == numbers[:, None, :])
    expected = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ groups[1]
    bound = bind_attention(causal_attention, name, others=name == "efficient")
    torch.testing.assert_close(bound(q, k, v, numbers), expected, rtol=1e-5, atol=1e-6)


def test_flex_agrees() -> None:
    """Only its forward pass, which exists on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 16, generator=generator) for heads in (4, 2, 2))
    numbers = torch.stack([torch.arange(32) // 9, torch.arange(32) // 32])
    found = bind_attention(causal_attention, "flex")(q, k, v, numbers)
    torch.testing.assert_close(found, causal_attention(q, k, v, numbers), rtol=1e-5, atol=1e-6)


def test_the_kernel_is_chosen_for_the_mask() -> None:
    model = ModelConfig(num_heads=4, num_kv_heads=2, model_dim=64, seq_len=32, document_mask=True)
    assert chosen_attention(model, ParallelConfig(), CPU) == "flash"
    with pytest.raises(UserError, match=r"and model\.document_mask; fix: parallel\.attention=auto"):
        chosen_attention(model, ParallelConfig(attention="flex"), CPU)


# ---------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 20 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.Generator(np.random.PCG64(0))
    for name, size in (("train_0", 6000), ("val_0", 500)):
        ids = generator.integers(8, 61, size).astype(np.uint16)
        ids[np.cumsum(generator.integers(1, 21, size // 21))] = BOS
        write_shard(folder / f"{name}.bin", ids)
    return folder


@pytest.mark.slow
def test_any_number_of_ranks_and_one_graph(corpus: Path) -> None:
    """Boundaries differ from batch to batch and recompile nothing."""
    config = masked(corpus, train__steps=8, eval__every=4)
    compiled = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"compile": True})}
    )
    records, graphs = run_ranks(count, 1, compiled)[0]
    assert records[-1]["compile/recompiles"] == 0
    assert len(graphs) == 2 * 5 + 1
    assert_same_run(run_ranks(train, 2, config)[0][:-1], records)


def test_a_run_directory_suffices_to_use_the_model(corpus: Path, tmp_path: Path) -> None:
    """``data.bos_id`` is filled in from meta.json or the tokenizer."""
    plain = masked(corpus, model__vocab_size=257, data__tokenizer="bytes", data__bos_id="null")
    config = with_bos(plain)
    assert config.data.bos_id == 256
    model = noisy_model(config)
    save_checkpoint(tmp_path, 4, config, model, model)
    loaded = jepa_dist.load(tmp_path)
    model.bos_id = 256
    ids = torch.randint(0, 256, (1, 12))
    ids[0, 5] = 256
    expected = model(ids, phase=PHASE).logits_BTV
    torch.testing.assert_close(loaded.model(ids, phase=PHASE).logits_BTV, expected)
    assert with_bos(config) == config


# ---------------------------------------------------------------------------- user errors


def test_impossible_settings(tmp_path: Path, corpus: Path) -> None:
    def problems(**changes: Any) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(None, tiny_overrides(tmp_path, **changes), {})
        return list(caught.value.problems)

    assert problems(model__reset_positions=True) == [
        "model.reset_positions=true: needs model.document_mask=true"
    ]
    (problem,) = problems(model__document_mask=True)
    assert problem.endswith("set jepa.within_documents=true")
    for objective in ("next_state", "next_latent"):
        (problem,) = problems(model__document_mask=True, jepa__objective=objective)
        assert problem.endswith(f"set jepa.{objective}.within_documents=true")
    assert check(masked(tmp_path)) == []
    with pytest.raises(UserError, match=r"model\.document_mask=true: nothing says which id"):
        check_data(
            tiny_config(
                corpus, data__tokenizer="null", **{"model__document_mask": True, "jepa__lambda": 0}
            )
        )
    with pytest.raises(UserError, match=r"model\.document_mask=True: the challenge's script lacks"):
        settings_of(masked(tmp_path).model)
    with pytest.raises(ValueError, match="needs the id that begins a document"):
        GPT(masked(tmp_path).model).places(torch.zeros(1, 4, dtype=torch.int64))
