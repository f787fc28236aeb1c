"""The configurations: the published recipe exactly, and the others as their headers describe."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from jepa_dist.config import Config, flatten, load, to_dict
from jepa_dist.evaluate.__main__ import _DEFAULT_STRIDE
from jepa_dist.model.gpt import GPT
from tests.support.tiny import REPOSITORY

CONFIGS = REPOSITORY / "configs"

# The public log of parameter-golf PR #1412, seed 1337, on 8 H100. Two of its settings have no key:
# its 20 warm-up steps, which it undoes again (here parallel.compile_warmup), and the 524,288 tokens
# of its validation batches, which only decide how sums are rounded.
PUBLISHED = {
    "seed": 1337,
    "train.steps": 20_000,
    "train.max_wallclock_seconds": 600.0 - 12.0,
    "train.enable_looping_at": 0.5,
    "train.loop_phase2_at": 0.65,
    "batch.sequences": 786_432 / 2048,
    "model.vocab_size": 8192,
    "model.seq_len": 2048,
    "model.num_layers": 11,
    "model.model_dim": 512,
    "model.embedding_dim": None,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.mlp_mult": 4,
    "model.tie_embeddings": True,
    "model.tied_embed_init_std": 0.005,
    "model.logit_softcap": 30,
    "model.rope_base": 10_000,
    "model.rope_dims": 16,
    "model.qk_gain_init": 4.0,
    "model.ln_scale": True,
    "model.xsa_last_n": 11,
    "model.x0_mix": True,
    "model.branch_scales": True,
    "model.unet_skips": True,
    "model.skip_gates": True,
    "model.parallel_residual_start": 7,
    "model.num_loops": 2,
    "model.loop_start": 4,
    "model.loop_end": 5,
    "model.untie_loop_mlps": False,
    "model.document_mask": False,
    "model.reset_positions": False,
    "jepa.lambda": 0.0,
    "optim.matrix": "muon",
    "optim.matrix_lr": 0.02,
    "optim.matrix_wd": 0.085,
    "optim.scalar_lr": 0.02,
    "optim.tied_embed_lr": 0.03,
    "optim.embed_lr": 0.6,
    "optim.embed_wd": 0.085,
    "optim.head_lr": 0.008,
    "optim.adam_wd": 0.02,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.eps": 1e-8,
    "optim.muon_momentum": 0.99,
    "optim.muon_momentum_warmup_start": 0.92,
    "optim.muon_momentum_warmup_steps": 1500,
    "optim.muon_nesterov": True,
    "optim.muon_row_normalize": True,
    "optim.muon_backend_steps": 5,
    "optim.muon_coefficients": "fixed",
    "optim.grad_clip_norm": 0.3,
    "optim.warmdown_frac": 0.667,
    "optim.min_lr": 0.0,
    "optim.ema_decay": 0.997,
    "parallel.compile_warmup": True,
}
PUBLISHED_PARAMETERS = 35_943_512
PUBLISHED_STRIDE = 64

# What the reference adds to a plain GPT: off by default, one key each.
MODEL_EXTRAS = {
    "model.logit_softcap",
    "model.rope_dims",
    "model.qk_gain_init",
    "model.ln_scale",
    "model.xsa_last_n",
    "model.x0_mix",
    "model.branch_scales",
    "model.unet_skips",
    "model.skip_gates",
    "model.parallel_residual_start",
    "model.num_loops",
}
TRAINING_EXTRAS = {"train.loop_phase2_at", "optim.matrix", "optim.ema_decay"}
MODEL_SIZES = {
    "model.vocab_size",
    "model.seq_len",
    "model.num_layers",
    "model.model_dim",
    "model.num_heads",
    "model.num_kv_heads",
    "model.loop_start",
    "model.loop_end",
}
# Choices that do not depend on the size of the model or the length of the run.
SAME_IN_DEBUG = [
    "train.enable_looping_at",
    "train.loop_phase2_at",
    "model.tie_embeddings",
    "model.mlp_mult",
    "model.num_loops",
    "model.untie_loop_mlps",
    "optim.matrix",
    "optim.muon_nesterov",
    "optim.muon_row_normalize",
    "optim.muon_backend_steps",
    "optim.muon_coefficients",
    "optim.warmdown_frac",
    "optim.min_lr",
]
# On if above zero, whatever the value.
ABOVE_ZERO = ["optim.grad_clip_norm", "optim.warmdown_frac", "optim.muon_momentum_warmup_steps"]


def config_of(name: str) -> Config:
    return load(CONFIGS / f"{name}.yaml", (), {}).config


def values(config: Config) -> dict[str, Any]:
    return dict(flatten(to_dict(config)))


def number_of_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config.model).parameters())


@pytest.mark.parametrize("key", PUBLISHED)
def test_gpt_36m_is_the_published_run(key: str) -> None:
    assert values(config_of("gpt_36m"))[key] == PUBLISHED[key]


def test_every_choice_of_gpt_36m_is_accounted_for() -> None:
    sections = ("model.", "optim.")
    chosen = {key for key in values(Config()) if key.startswith(sections)}
    assert chosen - PUBLISHED.keys() == {"optim.muon_dtype"}  # auto: bfloat16 on GPUs, as there


def test_gpt_36m_has_the_published_size() -> None:
    assert number_of_parameters(config_of("gpt_36m")) == PUBLISHED_PARAMETERS


def test_sliding_evaluation_has_the_published_stride() -> None:
    assert _DEFAULT_STRIDE == PUBLISHED_STRIDE


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("gpt_*.yaml")), ids=lambda path: path.stem)
def test_sizes_are_what_the_headers_say(path) -> None:
    header = path.read_text(encoding="utf-8").splitlines()[0]
    number, unit = re.search(r"([\d.,]+) (million |billion |)parameters", header).groups()
    claimed = float(number.replace(",", "")) * {"million ": 1e6, "billion ": 1e9, "": 1}[unit]
    assert number_of_parameters(config_of(path.stem)) == pytest.approx(claimed, rel=5e-3)
    assert f"jepa_dist.train configs/{path.name}" in path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- debug.yaml


def test_the_list_of_extras_is_complete() -> None:
    ours, plain = values(config_of("gpt_36m")), values(Config())
    changed = {key for key in ours if key.startswith("model.") and ours[key] != plain[key]}
    assert changed - MODEL_SIZES == MODEL_EXTRAS


@pytest.mark.parametrize("key", sorted(MODEL_EXTRAS | TRAINING_EXTRAS))
def test_debug_has_every_extra_of_gpt_36m(key: str) -> None:
    off = values(Config())[key]
    assert values(config_of("gpt_36m"))[key] != off
    assert values(config_of("debug"))[key] != off


@pytest.mark.parametrize("key", SAME_IN_DEBUG)
def test_debug_makes_the_choices_of_gpt_36m(key: str) -> None:
    assert values(config_of("debug"))[key] == values(config_of("gpt_36m"))[key]


@pytest.mark.parametrize("key", ABOVE_ZERO)
def test_debug_has_what_gpt_36m_has(key: str) -> None:
    assert values(config_of("gpt_36m"))[key] > 0
    assert values(config_of("debug"))[key] > 0


@pytest.mark.parametrize("name", ["gpt_36m", "debug"])
def test_both_kinds_of_block_and_all_of_xsa(name: str) -> None:
    model = config_of(name).model
    assert 0 < model.parallel_residual_start < model.num_layers
    assert model.xsa_last_n == model.num_layers
    assert model.num_kv_heads < model.num_heads
    assert 0 < model.rope_dims < model.head_dim
    assert 0 < model.loop_start <= model.loop_end < model.num_layers - 1
