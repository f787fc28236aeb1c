"""Floating-point operations of training, for MFU."""

from __future__ import annotations

from jepa_dist.config import ModelConfig
from jepa_dist.model.execution import execution_order


def training_flops_per_token(config: ModelConfig, phase: int) -> float:
    """Return the FLOPs of forward and backward per trained token.

    6 per matrix element used for a token (each execution of a looped block counts, the embedding
    look-up does not), plus 12 * width * T per attention execution, not halved for causality: the
    convention of PaLM, torchtitan and nanochat, so that figures are comparable.
    """
    width, kv_width = config.model_dim, config.num_kv_heads * config.head_dim
    attention = 2 * width * width + 2 * width * kv_width
    mlp = 2 * width * config.mlp_hidden
    order = execution_order(config, phase)
    executions = len(order.encoder) + len(order.decoder)
    projections = 2 * width * config.embed_width if config.embed_width != width else 0
    head = config.embed_width * config.vocab_size
    matrices = executions * (attention + mlp) + projections + head
    return 6.0 * matrices + 12.0 * executions * width * config.seq_len
