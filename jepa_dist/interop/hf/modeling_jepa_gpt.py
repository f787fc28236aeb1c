"""A GPT trained with jepa_dist, for transformers (``trust_remote_code=True``).

Only needs torch and transformers. The model is that of parameter-golf PR #1412: RMS norms without
weights, partial rotary embedding, grouped key/value heads, squared leaky ReLU, and optionally
U-Net skips, depth recurrence, exclusive self-attention (XSA) and parallel residuals.

Tensor names carry their shape: B batch, T new positions, S all positions, D model width, H query
heads, K key/value heads, C head width, R rotated dimensions of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

NORM_EPS = torch.finfo(torch.float32).eps
_LAST_PHASE = 2

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 257,
    "seq_len": 512,
    "num_layers": 4,
    "model_dim": 128,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_hidden": 512,
    "embedding_dim": 128,
    "tie_embeddings": True,
    "rope_base": 10000.0,
    "rotary_dims": 32,
    "has_q_gain": False,
    "ln_scale": False,
    "xsa_last_n": 0,
    "x0_mix": False,
    "branch_scales": False,
    "unet_skips": False,
    "skip_gates": False,
    "parallel_residual_start": -1,
    "num_loops": 0,
    "loop_start": 0,
    "loop_end": 0,
    "untie_loop_mlps": False,
    "logit_softcap": 0.0,
    "document_mask": False,
    "phase": 0,
}


class JepaGPTConfig(PreTrainedConfig):
    """Configuration; ``phase`` is the recurrence phase to run the weights in."""

    model_type = "jepa_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers has it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(self, **kwargs: Any) -> None:
        for name, default in _DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        # A cache has keys and values for each execution of a block: repetitions of a block have
        # different inputs.
        kwargs.pop("num_hidden_layers", None)
        self.num_hidden_layers = len(block_sequence(self, self.phase))
        super().__init__(**kwargs)


def block_sequence(config: JepaGPTConfig, phase: int) -> list[int]:
    """Return the blocks of a pass in execution order; the first half is the encoder."""
    repeats = {0: 0, 1: min(config.num_loops, 1), 2: config.num_loops}[phase]
    if repeats == 0:
        return list(range(config.num_layers))
    segment = list(range(config.loop_start, config.loop_end + 1))
    before = list(range(config.loop_start))
    return before + segment * (1 + repeats) + list(range(config.loop_end + 1, config.num_layers))


def inverse_rms(x: Tensor) -> Tensor:
    """Return the factor of RMS norm over the last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)


def rms_norm(x: Tensor) -> Tensor:
    """Apply RMS norm over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rope_tables(config: JepaGPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 [S, R/2]; rows longer than in training rescale the base."""
    rotated, base = config.rotary_dims, config.rope_base
    if length > config.seq_len:
        if rotated == 2:
            raise ValueError(
                f"{length} positions: rows longer than {config.seq_len} need more "
                "than 2 rotated dimensions"
            )
        base *= (length / config.seq_len) ** (rotated / (rotated - 2))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_SR = torch.outer(positions, base**-exponents)
    return angles_SR.cos(), angles_SR.sin()


def rotate(x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first dimensions of every head by minus the angle, pairing j with j + R/2."""
    half = cos_TR.size(-1)
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    u, w, rest = x_BTHC.split([half, half, x_BTHC.size(-1) - 2 * half], dim=-1)
    return torch.cat([u * cos + w * sin, w * cos - u * sin, rest], dim=-1)


def remove_own_value(y_BTHC: Tensor, v_BTKC: Tensor) -> Tensor:
    """Remove from each head's output its component along its own position's value (XSA)."""
    v_BTHC = v_BTKC.repeat_interleave(y_BTHC.size(2) // v_BTKC.size(2), dim=2)
    v_BTHC = v_BTHC.to(torch.promote_types(v_BTHC.dtype, torch.float32))
    square_BTH1 = v_BTHC.square().sum(-1, keepdim=True).clamp(min=1e-24)
    share_BTH1 = (y_BTHC * v_BTHC).sum(-1, keepdim=True) / square_BTH1
    return (y_BTHC - share_BTH1 * v_BTHC).type_as(y_BTHC)


def project(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the product, with a scale per output channel."""
    return F.linear(x, weight if scale is None else weight * scale[:, None])


class Attention(nn.Module):
    """Causal attention with QK norm, partial rotary embedding and grouped key/value heads."""

    def __init__(self, config: JepaGPTConfig, index: int) -> None:
        super().__init__()
        width = config.model_dim
        self.head_dim = width // config.num_heads
        self.xsa = index >= config.num_layers - config.xsa_last_n
        kv_width = config.num_kv_heads * self.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_gain = nn.Parameter(torch.ones(config.num_heads)) if config.has_q_gain else None

    def forward(
        self,
        x_BTD: Tensor,
        tables: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None,
        scale_D: Tensor | None,
        cache: Cache | None,
        execution: int,
    ) -> Tensor:
        """Attend over the normalized ``x_BTD`` and the cache; return [B, T, D]."""
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        heads_BTHC = F.linear(x_BTD, torch.cat(weights)).unflatten(-1, (-1, self.head_dim))
        q_BTHC, k_BTKC, v_BTKC = heads_BTHC.split([len(w) // self.head_dim for w in weights], 2)
        q_norm_BTH1, k_norm_BTK1 = inverse_rms(q_BTHC), inverse_rms(k_BTKC)
        if self.q_gain is not None:
            q_norm_BTH1 = q_norm_BTH1 * self.q_gain[:, None]
        q_BHTC = rotate(q_BTHC * q_norm_BTH1, *tables).type_as(x_BTD).transpose(1, 2)
        k_BKSC = rotate(k_BTKC * k_norm_BTK1, *tables).type_as(x_BTD).transpose(1, 2)
        v_BKSC = v_BTKC.transpose(1, 2)
        if cache is not None:
            k_BKSC, v_BKSC = cache.update(k_BKSC, v_BKSC, execution)
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            attn_mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=mask_BTS is None and q_BHTC.size(2) > 1,
            enable_gqa=q_BHTC.size(1) != k_BKSC.size(1),
        )
        y_BTHC = y_BHTC.transpose(1, 2)
        if self.xsa:
            y_BTHC = remove_own_value(y_BTHC, v_BTKC)
        return project(y_BTHC.reshape(x_BTD.shape), self.proj.weight, scale_D)


class MLP(nn.Module):
    """Two linear layers around a squared leaky ReLU."""

    def __init__(self, config: JepaGPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.model_dim, config.mlp_hidden, bias=False)
        self.proj = nn.Linear(config.mlp_hidden, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, norm_BT1: Tensor, scale_D: Tensor | None) -> Tensor:
        """Transform each position of ``norm * x``: [B, T, D]."""
        hidden = F.leaky_relu(self.fc(x_BTD), 0.5).square() * norm_BT1.square()
        return project(hidden.type_as(x_BTD), self.proj.weight, scale_D)


class Block(nn.Module):
    """Attention and MLP, in sequence or in parallel."""

    def __init__(self, config: JepaGPTConfig, index: int) -> None:
        super().__init__()
        width = config.model_dim
        self.parallel = 0 <= config.parallel_residual_start <= index
        self.attn = Attention(config, index)
        self.mlp = MLP(config)
        is_untied = config.untie_loop_mlps and config.loop_start <= index <= config.loop_end
        self.loop_mlps = nn.ModuleList(MLP(config) for _ in range(config.num_loops * is_untied))
        self.attn_scale = nn.Parameter(torch.ones(width)) if config.branch_scales else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if config.branch_scales else None
        self.resid_mix = nn.Parameter(torch.ones(2, width)) if config.x0_mix else None
        self.norm_scale = 1.0 / math.sqrt(index + 1) if config.ln_scale else None

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        tables: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None,
        repeat: int,
        cache: Cache | None,
        execution: int,
    ) -> Tensor:
        """Run the block on the stream; ``repeat`` counts its earlier executions in this pass."""
        mlp = self.loop_mlps[repeat - 1] if repeat and len(self.loop_mlps) else self.mlp
        if self.resid_mix is not None:
            x_BTD = self.resid_mix[0] * x_BTD + self.resid_mix[1] * x0_BTD
        norm_BT1 = self._norm(x_BTD)
        normed_BTD = (x_BTD * norm_BT1).type_as(x_BTD)
        attended_BTD = self.attn(normed_BTD, tables, mask_BTS, self.attn_scale, cache, execution)
        if self.parallel:
            return x_BTD + attended_BTD + mlp(x_BTD, norm_BT1, self.mlp_scale)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + mlp(x_BTD, self._norm(x_BTD), self.mlp_scale)

    def _norm(self, x_BTD: Tensor) -> Tensor:
        norm_BT1 = inverse_rms(x_BTD)
        return norm_BT1 if self.norm_scale is None else norm_BT1 * self.norm_scale


class JepaGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head.

    Up to ``config.seq_len`` positions, ``generate`` caches keys and values. Beyond, the context is
    a window of the last ``seq_len`` tokens, which is recomputed for each token.
    """

    config_class = JepaGPTConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: JepaGPTConfig) -> None:
        super().__init__(config)
        width, embed_width = config.model_dim, config.embedding_dim
        self.tok_emb = nn.Embedding(config.vocab_size, embed_width)
        projected = embed_width != width
        self.embed_proj = nn.Linear(embed_width, width, bias=False) if projected else None
        self.head_proj = nn.Linear(width, embed_width, bias=False) if projected else None
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(embed_width, config.vocab_size, bias=False)
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        rows = len(block_sequence(config, _LAST_PHASE)) // 2 if config.unet_skips else 0
        self.num_skips = rows
        self.skip_weights = nn.Parameter(torch.ones(rows, width)) if rows else None
        has_gates = rows > 0 and config.skip_gates
        self.skip_gates = nn.Parameter(torch.zeros(rows, width)) if has_gates else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.tok_emb

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run one pass.

        Args:
            input_ids: int64 [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, S]; S includes cached positions.
            past_key_values: Keys and values of earlier positions; extended in place.
            labels: int64 [B, T]; each position predicts the label after it; -100 does not count.
            use_cache: Create a cache if there is none.
            logits_to_keep: Return only the logits of this many last positions; 0: all.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        total = past + input_ids.size(1)
        if past and total > self.config.seq_len:
            raise ValueError(
                f"{total} positions: a cache holds at most {self.config.seq_len}, because longer "
                "rows have another rotary base; pass the whole row without a cache"
            )
        if self.config.document_mask:
            _refuse_packed(input_ids, attention_mask, self.config.bos_token_id)
        tables = rope_tables(self.config, total, input_ids.device)
        new = (tables[0][past:], tables[1][past:])
        x_BTD = rms_norm(self.tok_emb(input_ids))
        x_BTD = x_BTD if self.embed_proj is None else self.embed_proj(x_BTD)
        mask_BTS = _mask(attention_mask, input_ids.size(1), total)
        x_BTD = self._run_blocks(x_BTD, new, mask_BTS, past_key_values)
        logits_BTV = self._head(x_BTD[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            flat_NV = logits_BTV[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(flat_NV, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)

    def _run_blocks(
        self,
        x_BTD: Tensor,
        tables: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Run the encoder, then the decoder with skips."""
        order = block_sequence(self.config, self.config.phase)
        half, x0_BTD = len(order) // 2, x_BTD
        stack: list[Tensor] = []
        for execution, index in enumerate(order):
            row = execution - half
            if (
                row >= 0
                and self.skip_weights is not None
                and row < len(self.skip_weights)
                and stack
            ):
                x_BTD = self._skip(x_BTD, stack.pop(), row)
            repeat = order[:execution].count(index)
            block = self.blocks[index]
            x_BTD = block(x_BTD, x0_BTD, tables, mask_BTS, repeat, cache, execution)
            if row < 0:
                stack.append(x_BTD)
        return x_BTD

    def _skip(self, x_BTD: Tensor, s_BTD: Tensor, row: int) -> Tensor:
        assert self.skip_weights is not None
        skip_BTD = self.skip_weights[row] * s_BTD
        if self.skip_gates is None:
            return x_BTD + skip_BTD
        return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(self.skip_gates[row]))

    def _head(self, x_BTD: Tensor) -> Tensor:
        y = rms_norm(x_BTD)
        y = y if self.head_proj is None else self.head_proj(y)
        weight = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        logits_BTV = F.linear(y, weight).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits_BTV / cap) if cap > 0 else logits_BTV

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Slide the window if the row would become longer than in training."""
        length = self.config.seq_len
        if input_ids.size(1) <= length:
            prepared: dict[str, Any] = super().prepare_inputs_for_generation(
                input_ids, attention_mask=attention_mask, **kwargs
            )
            return prepared
        mask = None if attention_mask is None else attention_mask[:, -length:]
        return {"input_ids": input_ids[:, -length:], "attention_mask": mask, "use_cache": False}


def _refuse_packed(input_ids: Tensor, attention_mask: Tensor | None, bos_id: int) -> None:
    """Raise if a document begins after a row's first token: attention would cross documents."""
    is_start = input_ids[:, 1:] == bos_id
    if attention_mask is not None:  # padding is not a document
        own = attention_mask[:, -input_ids.size(1) :].bool()
        is_start = is_start & own[:, :-1] & own[:, 1:]
    if bool(is_start.any()):
        raise ValueError(
            f"input_ids: a document begins (id {bos_id}) after the first token; this model attends "
            "within documents only: pass each document as a row of its own"
        )


def _mask(attention_mask: Tensor | None, count: int, total: int) -> Tensor | None:
    """Return the positions visible to each new one, [B, T, S]; None: all earlier ones."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    device = attention_mask.device
    places_S = torch.arange(total, device=device)
    own_T = places_S[total - count :, None]
    seen_BTS = attention_mask.bool()[:, None, :] & (places_S <= own_T)
    # Padding attends to itself, so that its softmax is defined.
    return seen_BTS | (places_S == own_T)
