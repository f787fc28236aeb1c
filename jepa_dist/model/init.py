"""Initial values as a pure function of (config, seed, parameter name): golden README section 1.

Every parameter has its own generator, so that any rank can compute any parameter independently and
keep only its shard, and the weights do not depend on the world size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from jepa_dist.config import ModelConfig

_ORTHOGONAL_FROM = 64


def initial_value(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device
) -> Tensor:
    """Return the full initial tensor of parameter ``name``, float32 on ``device``.

    Random numbers are drawn on the CPU, so that they do not depend on the device.
    """
    return _rule(name, config)(shape, _generator(name, seed), device)


def fan_in_uniform(name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Return a matrix [out, in] uniform within 1/sqrt(in), float32 on ``device``.

    A function of seed and name, as ``initial_value`` is.
    """
    return _uniform(shape, _generator(name, seed), device)


_Rule = Callable[[torch.Size, torch.Generator, torch.device], Tensor]


def _rule(name: str, config: ModelConfig) -> _Rule:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if name == "tok_emb.weight":
        return _normal(config.tied_embed_init_std if config.tie_embeddings else 1.0)
    if leaf in ("proj", "lm_head", "skip_gates"):
        return _constant(0.0)
    if leaf in ("attn_scale", "mlp_scale", "skip_weights"):
        return _constant(1.0)
    if leaf == "q_gain":
        return _constant(config.qk_gain_init or 1.0)
    if leaf == "resid_mix":
        return _stream_only
    if leaf in ("c_q", "c_k", "c_v", "fc", "embed_proj", "head_proj"):
        return _matrix
    raise KeyError(f"parameter {name!r} has no initialization rule")


def _constant(value: float) -> _Rule:
    return lambda shape, generator, device: torch.full(shape, value, device=device)


def _normal(std: float) -> _Rule:
    return lambda shape, generator, device: (
        torch.randn(shape, generator=generator).mul_(std).to(device)
    )


def _stream_only(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    mix = torch.zeros(shape, device=device)
    mix[0] = 1.0
    return mix


def _matrix(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    rows, columns = shape
    if min(rows, columns) < _ORTHOGONAL_FROM:
        return _uniform(shape, generator, device)
    gaussian = torch.randn(max(rows, columns), min(rows, columns), generator=generator).to(device)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.sign(torch.diagonal(r))  # makes the factorization, and thereby the sample, unique
    return q if rows >= columns else q.T.contiguous()


def _uniform(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    bound = 1.0 / math.sqrt(shape[1])
    uniform = torch.rand(shape, generator=generator)
    return uniform.mul_(2 * bound).sub_(bound).to(device)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"init/{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
