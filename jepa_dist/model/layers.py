"""The parts of a block: norm, rotary embedding, attention, MLP (golden README section 1).

Of equivalent formulas, these move the fewest bytes through memory, which takes half of a small
model's step: scales are folded into weights, norms are applied as factors to tensors that are read
anyway (docs/performance.md, "Bytes per block", has the counts).

Tensor names carry their shape: B batch, T sequence, D model width, H query heads, K key/value
heads, C head width, R rotated dimensions of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.config import ModelConfig

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Causal attention, with the arguments of ``causal_attention``."""

# The reference gives no epsilon, which means that of float32, whatever the activations' dtype.
NORM_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Return the RMS norm over the last dimension, without weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def inverse_rms(x: Tensor) -> Tensor:
    """Return the factor by which RMS norm scales each vector of the last dimension, [..., 1], in
    float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)


def rope_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles, float32 [T, R/2] each.

    Lengths strictly above ``seq_len`` rescale the base (NTK style); the frequencies' denominator
    is the number of rotated dimensions, not the head width.
    """
    rotated = config.rotary_dims
    base = config.rope_base
    if length > config.seq_len:
        if rotated == 2:
            raise ValueError("model.rope_dims=2 cannot be rescaled to longer sequences; use >= 4")
        base *= (length / config.seq_len) ** (rotated / (rotated - 2))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_TR = torch.outer(positions, base**-exponents)
    return angles_TR.cos(), angles_TR.sin()


def rotate(x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head, pairing j with j + R/2, by minus the angle; in
    the tables' dtype. The tables may differ by row: [B, T, R/2]."""
    half = cos_TR.size(-1)
    cos, sin = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    u, w, rest = x_BTHC.split([half, half, x_BTHC.size(-1) - 2 * half], dim=-1)
    return torch.cat([u * cos + w * sin, w * cos - u * sin, rest], dim=-1)


def remove_own_value(y_BTHC: Tensor, v_BTKC: Tensor) -> Tensor:
    """XSA: remove from each head's output its component along its own position's value."""
    # Repeated for each query head, so that all sums have one shape and compile to one kernel.
    v_BTHC = v_BTKC.repeat_interleave(y_BTHC.size(2) // v_BTKC.size(2), dim=2)
    v_BTHC = v_BTHC.to(torch.promote_types(v_BTHC.dtype, torch.float32))
    square_BTH1 = v_BTHC.square().sum(-1, keepdim=True).clamp(min=1e-24)
    share_BTH1 = (y_BTHC * v_BTHC).sum(-1, keepdim=True) / square_BTH1
    return (y_BTHC - share_BTH1 * v_BTHC).type_as(y_BTHC)


def project(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``scale * (weight @ x)``, one scale per output channel; scales the weight, which is
    smaller."""
    return F.linear(x, weight if scale is None else weight * scale[:, None])


def causal_attention(
    q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None
) -> Tensor:
    """Attend causally, and only within the same document, with grouped key/value heads.

    Args:
        q_BHTC: Queries.
        k_BKTC: Keys.
        v_BKTC: Values.
        documents_BT: Numbers of the positions' documents; None: all earlier positions are visible.

    Returns:
        [B, H, T, C].
    """
    grouped = q_BHTC.size(1) != k_BKTC.size(1)
    if documents_BT is None:
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=grouped
        )
    index_T = torch.arange(q_BHTC.size(2), device=q_BHTC.device)
    visible_B1TT = same_document(documents_BT, documents_BT) & (index_T[:, None] >= index_T)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKTC, v_BKTC, attn_mask=visible_B1TT, enable_gqa=grouped
    )


def same_document(query_BT: Tensor, key_BS: Tensor) -> Tensor:
    """Return whether a query's and a key's document are the same, bool [B, 1, T, S]."""
    return query_BT[:, None, :, None] == key_BS[:, None, None, :]


class Attention(nn.Module):
    """Causal attention with QK norm, partial rotary embedding and grouped key/value heads.

    ``attend`` may be replaced by a function with the same result (another kernel).
    """

    def __init__(self, config: ModelConfig, *, xsa: bool) -> None:
        super().__init__()
        width, kv_width = config.model_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.xsa = xsa
        self.attend: Attend = causal_attention
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_gain = (
            nn.Parameter(torch.empty(config.num_heads)) if config.qk_gain_init is not None else None
        )

    def forward(
        self,
        x_BTD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        scale_D: Tensor | None,
        documents_BT: Tensor | None,
    ) -> Tensor:
        """Attend over the normalized ``x_BTD``, scale the output's channels; return [B, T, D]."""
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        heads_BTHC = F.linear(x_BTD, torch.cat(weights)).unflatten(-1, (-1, self.head_dim))
        q_BTHC, k_BTKC, v_BTKC = heads_BTHC.split([len(w) // self.head_dim for w in weights], 2)
        q_norm_BTH1, k_norm_BTK1 = inverse_rms(q_BTHC), inverse_rms(k_BTKC)
        if self.q_gain is not None:
            q_norm_BTH1 = q_norm_BTH1 * self.q_gain[:, None]
        q_BTHC = rotate(q_BTHC * q_norm_BTH1, cos_TR, sin_TR).type_as(x_BTD)
        k_BTKC = rotate(k_BTKC * k_norm_BTK1, cos_TR, sin_TR).type_as(x_BTD)
        q_BHTC, k_BKTC = q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2)
        y_BHTC = self.attend(q_BHTC, k_BKTC, v_BTKC.transpose(1, 2), documents_BT)
        y_BTHC = y_BHTC.transpose(1, 2)
        if self.xsa:
            y_BTHC = remove_own_value(y_BTHC, v_BTKC)
        return project(y_BTHC.reshape(x_BTD.shape), self.proj.weight, scale_D)


class MLP(nn.Module):
    """Two linear layers around a squared leaky ReLU (slope 0.5, so z^2 or 0.25 z^2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.model_dim, config.mlp_hidden, bias=False)
        self.proj = nn.Linear(config.mlp_hidden, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, norm_BT1: Tensor, scale_D: Tensor | None) -> Tensor:
        """Transform each position of ``norm * x``, scale the output's channels: [B, T, D].

        The norm's factor is positive, so it commutes with the first product and with the leaky
        ReLU: if it is applied (squared) to the hidden layer, only ``fc(x)`` is saved for backward,
        and the normalized stream is never written to memory.
        """
        hidden = F.leaky_relu(self.fc(x_BTD), 0.5).square() * norm_BT1.square()
        return project(hidden.type_as(x_BTD), self.proj.weight, scale_D)


class Block(nn.Module):
    """A transformer block: attention and MLP, in sequence or in parallel.

    Blocks that differ only in numbers share one compiled graph: values that differ by layer are
    tensors (``norm_scale``), booleans are only used for different computations.
    """

    norm_scale: Tensor | None

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width = config.model_dim
        self.parallel = 0 <= config.parallel_residual_start <= index
        self.attn = Attention(config, xsa=index >= config.num_layers - config.xsa_last_n)
        self.mlp = MLP(config)
        is_untied = config.untie_loop_mlps and config.loop_start <= index <= config.loop_end
        self.loop_mlps = nn.ModuleList(MLP(config) for _ in range(config.num_loops * is_untied))
        self.attn_scale = nn.Parameter(torch.empty(width)) if config.branch_scales else None
        self.mlp_scale = nn.Parameter(torch.empty(width)) if config.branch_scales else None
        self.resid_mix = nn.Parameter(torch.empty(2, width)) if config.x0_mix else None
        # On a real device even if the model is built on meta, since it has a value.
        scale = torch.tensor(1.0 / math.sqrt(index + 1), device="cpu") if config.ln_scale else None
        self.register_buffer("norm_scale", scale, persistent=False)

    def mlp_of_repeat(self, repeat: int) -> nn.Module:
        """Return the MLP of repetition ``repeat`` in a pass (a separate one if untied)."""
        if repeat == 0 or not self.loop_mlps:
            return self.mlp
        return self.loop_mlps[repeat - 1]

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor | None,
        cos_TR: Tensor,
        sin_TR: Tensor,
        mlp: nn.Module,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Run the block on the stream ``x_BTD``.

        Args:
            x_BTD: Residual stream.
            x0_BTD: Embedding at the start of the pass; must not be the same tensor as ``x_BTD``
                (aliasing costs a compiled graph). None without ``x0_mix``.
            cos_TR: Rotary cosines, float32; [B, T, R/2] if they differ by row.
            sin_TR: Rotary sines, likewise.
            mlp: One of this block's MLPs, from ``mlp_of_repeat``. An argument, so that every
                repeat runs the same compiled graph.
            documents_BT: Numbers of the positions' documents; None: attention crosses them.
        """
        if self.resid_mix is not None:
            assert x0_BTD is not None
            x_BTD = self.resid_mix[0] * x_BTD + self.resid_mix[1] * x0_BTD
        norm_BT1 = self._norm(x_BTD)
        normed_BTD = (x_BTD * norm_BT1).type_as(x_BTD)
        attended_BTD = self.attn(normed_BTD, cos_TR, sin_TR, self.attn_scale, documents_BT)
        if self.parallel:
            return x_BTD + attended_BTD + mlp(x_BTD, norm_BT1, self.mlp_scale)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + mlp(x_BTD, self._norm(x_BTD), self.mlp_scale)

    def _norm(self, x_BTD: Tensor) -> Tensor:
        """Return the RMS norm of the stream as a factor of each position: [B, T, 1]."""
        norm_BT1 = inverse_rms(x_BTD)
        return norm_BT1 if self.norm_scale is None else norm_BT1 * self.norm_scale
