"""Memory check: does the run fit, estimated before anything large is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World
from jepa_dist.process.dist_env import ranks_on_this_host

_FLOAT = 4
_GIB = 2**30
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def check_memory(config: Config, world: World) -> None:
    """Compare a lower bound of the memory that this host's ranks need with what is available.

    Raises:
        UserError: the memory cannot be enough.
    """
    state, activations = needed_bytes(config, world.world_size)
    if world.device.type == "cuda":
        place, ranks = torch.cuda.get_device_name(world.device), 1
        available = torch.cuda.get_device_properties(world.device).total_memory
    else:
        place, ranks, available = "this host", ranks_on_this_host(), host_memory()
    if ranks * (state + activations) > available:
        raise UserError(
            f"memory: each rank needs at least {(state + activations) / _GIB:.1f} GiB "
            f"({state / _GIB:.1f} for its share of {num_parameters(config):,} parameters, their "
            f"gradients and optimizer state, {activations / _GIB:.1f} for activations), and "
            f"{place} has {available / _GIB:.1f} GiB for {ranks} rank{'s' * (ranks > 1)}; use more "
            "ranks, a smaller model or a smaller batch.micro"
        )


def needed_bytes(config: Config, world_size: int) -> tuple[int, int]:
    """Return lower bounds of what one rank holds: (training state, activations), in bytes.

    The state is sharded; of the activations only the input of each executed block is counted,
    which even full activation checkpointing keeps.
    """
    model, parallel = config.model, config.parallel
    shards = max(1, world_size // parallel.dp_replicate)
    moments = 2 if config.optim.matrix == "adamw" else 1
    copies = 2 + moments + (config.optim.ema_decay > 0)
    state = num_parameters(config) * copies * _FLOAT // shards
    rows = min(config.batch.micro, -(-config.batch.sequences // world_size))
    width = _FLOAT if parallel.precision == "float32" else _FLOAT // 2
    return state, rows * model.seq_len * model.model_dim * width * _num_executions(config)


def num_parameters(config: Config) -> int:
    """Return the number of parameters in matrices (vectors do not count)."""
    model = config.model
    dim, kv_dim = model.model_dim, model.num_kv_heads * model.head_dim
    mlp = 2 * dim * model.mlp_hidden
    loop_mlps = model.num_loops * _num_looped(config) if model.untie_loop_mlps else 0
    blocks = model.num_layers * (2 * dim * dim + 2 * dim * kv_dim + mlp) + loop_mlps * mlp
    embeddings = model.vocab_size * model.embed_width * (1 if model.tie_embeddings else 2)
    projections = 2 * dim * model.embed_width if model.embed_width != dim else 0
    return blocks + embeddings + projections


def _num_looped(config: Config) -> int:
    return config.model.loop_end - config.model.loop_start + 1 if config.model.num_loops else 0


def _num_executions(config: Config) -> int:
    return config.model.num_layers + config.model.num_loops * _num_looped(config)


def host_memory() -> int:
    """Return the bytes of memory that the processes of this host (or container) may use."""
    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)
