"""Text samples: deterministic, static in shape, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_dist.config import Config
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.generate import generate
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus

BYTES = load_tokenizer("bytes")
CPU = torch.device("cpu")


def tiny_model(config: Config) -> GPT:
    """Return a plain model whose logits differ from token to token."""
    model = GPT(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.copy_(
                initial_value(name, parameter.shape, config.model, 1, CPU) + 0.3 * noise
            )
    return model


def sample(model: GPT, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "prompt": "def",
        "num_tokens": 40,
        "temperature": 1.0,
        "seed": 3,
        "phase": 2,
        "device": CPU,
    }
    settings |= changes
    return generate(model, BYTES, settings.pop("prompt"), **settings)


def test_a_sample_is_a_function_of_its_seed(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tmp_path))
    before = torch.get_rng_state()
    first, again, other = sample(model), sample(model), sample(model, seed=4)
    assert first == again != other
    assert first.startswith("def")
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(model, num_tokens=0) == "def"
    assert len(sample(model, prompt="", num_tokens=3)) <= 3


def test_temperature_zero_takes_the_likeliest_token(tmp_path: Path) -> None:
    """Against whole, growing rows; from the 24th token on the window slides."""
    model = tiny_model(tiny_config(tmp_path))
    ids = [BYTES.bos_id, *b"def"]
    with torch.no_grad():
        for _ in range(40):
            logits_BTV = model(torch.tensor([ids[-24:]]), phase=2).logits_BTV
            ids.append(int(logits_BTV[0, -1].argmax()))
    model = tiny_model(tiny_config(tmp_path))
    assert sample(model, temperature=0.0) == BYTES.decode(ids)
    assert [length for length, _ in model._rope] == [24]  # one shape, no longer than in training


def test_prompts_longer_than_the_context(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tmp_path))
    tail = "abcdefghijklmnopqrstuvwx"
    long, longer = (sample(model, prompt=head + tail) for head in ("", "0123456789" * 9))
    assert long.removeprefix(tail) == longer.removeprefix("0123456789" * 9 + tail)


def train_and_sample(rank: int, world_size: int, config: Config) -> tuple[str, int]:
    """Train and sample; return the text and the number of graphs that sampling compiled."""
    graphs = []
    plain = torch.nn.Module.compile

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.nn.Module.compile = lambda self, **options: plain(self, backend=backend, **options)
    trainer = build_trainer(config, start_world(config.parallel))
    trainer.run()
    before = len(graphs)
    assert before > 0
    state = trainer.state
    text = sample(state.root)
    state.schedule.release()
    trainer.evaluation.validation.run(state.root, phase=2)
    return text, len(graphs) - before


@pytest.mark.slow
def test_a_sharded_model_generates_the_same_and_compiles_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = tiny_config(tmp_path, parallel__compile=True, train__steps=2)
    alone = run_ranks(train_and_sample, 1, config)
    together = run_ranks(train_and_sample, 3, config)
    assert {text for text, _ in together} == {text for text, _ in alone}
    assert {count for _, count in [*alone, *together]} == {0}
