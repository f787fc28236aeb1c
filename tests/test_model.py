"""The model beyond the golden cases: plain defaults, taps, initial values, FLOPs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_dist.config import ModelConfig
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from jepa_dist.model.layers import rope_tables

CPU = torch.device("cpu")


def initialized(config: ModelConfig, seed: int = 0) -> GPT:
    model = GPT(config)
    for name, parameter in model.named_parameters():
        parameter.data = initial_value(name, parameter.shape, config, seed, CPU)
    return model


def randomized(config: ModelConfig) -> GPT:
    """Return a model without zero projections, so that every part has an effect."""
    model, generator = GPT(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def tokens(rows: int, length: int, vocab: int = 50) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------ a plain GPT by default


def plain_gpt(model: GPT, ids: Tensor, heads: int) -> Tensor:
    """Compute a pre-norm transformer with RoPE, QK norm and a tied head, independently."""
    weights = dict(model.named_parameters())
    batch, length = ids.shape
    norm = lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1.1920929e-07)  # noqa: E731
    x = norm(weights["tok_emb.weight"][ids])
    width = x.size(-1)
    angles = torch.arange(length)[:, None] * 10000.0 ** (
        -torch.arange(0, width // heads, 2) / (width // heads)
    )
    turn = torch.polar(torch.ones_like(angles), -angles)[:, None]  # minus the angle
    mask = torch.ones(length, length).tril().log()
    for i in range(model.config.num_layers):
        w = {n.removeprefix(f"blocks.{i}."): v for n, v in weights.items()}
        y = norm(x)
        q, k, v = ((y @ w[f"attn.c_{n}.weight"].T).view(batch, length, heads, -1) for n in "qkv")
        rotated = []
        for z in (norm(q), norm(k)):
            first, second = z.chunk(2, dim=-1)
            z = torch.complex(first, second) * turn
            rotated.append(torch.cat([z.real, z.imag], dim=-1))
        scores = torch.einsum("bqhc,bkhc->bhqk", *rotated) / math.sqrt(width // heads) + mask
        y = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).reshape(x.shape)
        x = x + y @ w["attn.proj.weight"].T
        hidden = norm(x) @ w["mlp.fc.weight"].T
        x = x + torch.where(hidden > 0, hidden, hidden / 2).square() @ w["mlp.proj.weight"].T
    return norm(x) @ weights["tok_emb.weight"].T


def test_defaults_are_a_plain_gpt() -> None:
    config = ModelConfig(vocab_size=50, seq_len=16, num_layers=3, model_dim=32, num_heads=4)
    model = randomized(config)
    names = {
        name.rpartition(".weight")[0].rpartition(".")[2] for name, _ in model.named_parameters()
    }
    assert names == {"tok_emb", "c_q", "c_k", "c_v", "proj", "fc"}
    ids = tokens(2, 16)
    torch.testing.assert_close(
        model(ids).logits_BTV, plain_gpt(model, ids, heads=4), rtol=1e-4, atol=1e-5
    )


def test_attention_is_causal() -> None:
    config = ModelConfig(
        vocab_size=50, seq_len=16, num_layers=4, model_dim=32, x0_mix=True, unet_skips=True,
        num_loops=2, loop_start=1, loop_end=2, xsa_last_n=4,
    )  # fmt: skip
    model, ids = randomized(config), tokens(1, 16)
    changed = ids.clone()
    changed[0, 10] += 1
    before, after = (model(x, phase=2).logits_BTV for x in (ids, changed))
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


# ------------------------------------------------------------------ taps and weights


def test_the_final_tap_is_the_tensor_that_the_head_reads() -> None:
    model, seen = randomized(ModelConfig(vocab_size=50, seq_len=16)), []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert model(tokens(1, 16), taps=(-1,)).taps[0] is seen[0]
    assert model(tokens(1, 16)).taps == ()


def test_rows_are_weighted() -> None:
    model = randomized(ModelConfig(vocab_size=50, seq_len=16))
    ids, targets = tokens(2, 16), tokens(2, 16).flip(1)
    first = model(ids[:1], targets[:1], torch.ones(1)).loss_sum
    padded = model(ids, targets, torch.tensor([1.0, 0.0])).loss_sum
    torch.testing.assert_close(first, padded)


def test_rotary_rescale_of_two_dimensions_is_refused() -> None:
    config = ModelConfig(seq_len=8, rope_dims=2)
    assert rope_tables(config, 8, CPU)[0].shape == (8, 1)
    with pytest.raises(ValueError, match="rope_dims=2"):
        rope_tables(config, 9, CPU)


# ------------------------------------------------------------------ initial values


def test_initial_values() -> None:
    config = ModelConfig(
        model_dim=64, num_heads=4, num_kv_heads=2, embedding_dim=48, tie_embeddings=False,
        qk_gain_init=4.0, x0_mix=True, branch_scales=True, unet_skips=True, skip_gates=True,
    )  # fmt: skip
    values = dict(initialized(config).named_parameters())
    assert values["tok_emb.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    for name in ("lm_head.weight", "blocks.1.attn.proj.weight", "blocks.1.mlp.proj.weight"):
        assert not values[name].any()
    query = values["blocks.0.attn.c_q.weight"]
    torch.testing.assert_close(query @ query.T, torch.eye(64), rtol=0, atol=1e-5)
    up = values["blocks.0.mlp.fc.weight"]
    torch.testing.assert_close(up.T @ up, torch.eye(64), rtol=0, atol=1e-5)
    key = values["blocks.0.attn.c_k.weight"]  # one side below 64: uniform
    assert key.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert torch.equal(values["blocks.0.resid_mix"], torch.stack([torch.ones(64), torch.zeros(64)]))
    assert (values["blocks.0.attn.q_gain"] == 4).all()
    assert (values["skip_weights"] == 1).all()
    assert not values["skip_gates"].any()


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = ModelConfig(tied_embed_init_std=0.005)
    one, same, other = (dict(initialized(config, s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["tok_emb.weight"], other["tok_emb.weight"])
    first, second = (one[f"blocks.{i}.attn.c_q.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert one["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.05)


# ------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_flops_against_torchs_counter(phase: int) -> None:
    config = ModelConfig(
        vocab_size=50, seq_len=32, num_layers=4, model_dim=32, num_kv_heads=2, embedding_dim=20,
        num_loops=2, loop_start=1, loop_end=2,
    )  # fmt: skip
    model, ids = randomized(config), tokens(2, 32)
    # The counter knows attention only as the matrix products of the unfused kernel.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), unfused, FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids, phase=phase).logits_BTV.flatten(0, 1), ids.flatten())
    forward = counter.get_total_flops() / ids.numel()
    assert training_flops_per_token(config, phase) == pytest.approx(3 * forward, rel=1e-6)
