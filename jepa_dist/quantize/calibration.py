"""Hessians of the matrices' inputs, collected on any number of ranks.

The sequences are divided into batches, each of which one rank computes: a batch has the same rows
on any number of ranks. Sums are float64, so that the result does not depend on their order and is
the same for any number of ranks.

Tensor names carry their shape: B batch, T sequence, D width, N positions (B * T flattened), C
columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_dist.data.layout import BatchLayout
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import MLP, Attend, Attention, remove_own_value, rms_norm
from jepa_dist.parallel.world import World

_Record = Callable[[str, Tensor], None]


@torch.no_grad()
def collect_hessians(
    model: GPT,
    tokens: npt.NDArray[np.int64],
    names: Collection[str],
    *,
    phase: int,
    micro: int,
    world: World,
) -> dict[str, Tensor]:
    """Return the Hessian of each matrix's inputs: sum of x x^T over all positions, divided by the
    number of batches. Collective.

    Args:
        model: A GPT, not compiled, sharded over ``world`` or not.
        tokens: int64 [sequences, T], the same on every rank.
        names: Parameters whose Hessians are needed.
        phase: Recurrence phase of the passes.
        micro: Sequences of a batch.
        world: Ranks that share the work.

    Returns:
        float64 [C, C] on the device by parameter name, the same on every rank. Matrices with the
        same inputs share one tensor. A matrix that no pass multiplies (the MLP of a repeat that
        ``phase`` does not run, an embedding that is only looked up) is omitted.
    """
    sites = _sites(model)
    sums = _Sums({sites[name] for name in names if name in sites})
    batches = -(-len(tokens) // micro)
    layout = BatchLayout(batches, 1, world.rank, world.world_size)
    with _recorded(model, sums.record):
        for index in range(layout.num_micro):
            # Ranks with fewer batches only take part in the collectives of the last passes.
            sums.is_active = index < len(layout.rows)
            first = layout.rows[index] * micro if sums.is_active else 0
            rows = torch.from_numpy(tokens[first : first + micro])
            model(rows.to(world.device), phase=phase)
    averages = sums.average(batches, world)
    return {name: averages[sites[name]] for name in names if sites.get(name) in averages}


class _Sums:
    """Sums of x x^T over all positions, by the site of the inputs."""

    def __init__(self, needed: Collection[str]) -> None:
        self.is_active = True
        self._needed = needed
        self._sums: dict[str, Tensor] = {}

    def record(self, site: str, x: Tensor) -> None:
        """Add the vectors in the last dimension of ``x``."""
        if not self.is_active or site not in self._needed:
            return
        x_NC = x.reshape(-1, x.size(-1)).double()
        gram_CC = x_NC.T @ x_NC
        self._sums[site] = self._sums[site].add_(gram_CC) if site in self._sums else gram_CC

    def average(self, batches: int, world: World) -> dict[str, Tensor]:
        """Return the average over all ranks' batches; a rank may have none. Collective."""
        sizes: dict[str, int] = {}
        for each in world.gather({site: len(total) for site, total in self._sums.items()}):
            sizes |= each
        averages = {}
        for site in sorted(sizes):
            total_CC = self._sums.pop(site, None)
            if total_CC is None:
                shape = (sizes[site], sizes[site])
                total_CC = torch.zeros(shape, dtype=torch.float64, device=world.device)
            if world.world_size > 1:
                dist.all_reduce(total_CC)
            averages[site] = total_CC / batches
        return averages


def _sites(model: GPT) -> dict[str, str]:
    """Return the site at which each matrix's inputs are recorded, by parameter name."""
    sites = {
        "head_proj.weight": "head_proj",
        "embed_proj.weight": "embed_proj",
        "tok_emb.weight" if model.lm_head is None else "lm_head.weight": "head",
    }
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            sites |= {f"{name}.{leaf}.weight": f"{name}.in" for leaf in ("c_q", "c_k", "c_v")}
            sites[f"{name}.proj.weight"] = f"{name}.proj"
        elif isinstance(module, MLP):
            sites |= {f"{name}.{leaf}.weight": f"{name}.{leaf}" for leaf in ("fc", "proj")}
    return sites


# ---------------------------------------------------------------------------- inputs


@contextmanager
def _recorded(model: GPT, record: _Record) -> Iterator[None]:
    """Call ``record`` with the inputs of matrices in every pass inside this context.

    The inputs are read at module boundaries, and computed again if they are internal to a module:
    this does not depend on how a module multiplies (fused, scaled weights).
    """
    with ExitStack() as stack:
        handles = [
            model.embed.register_forward_hook(_embed_hook(record)),
            model.head.register_forward_pre_hook(_head_hook(record)),
        ]
        for name, module in model.named_modules():
            if isinstance(module, MLP):
                handles.append(module.register_forward_pre_hook(_mlp_hook(name, record)))
            elif isinstance(module, Attention):
                handles.append(module.register_forward_pre_hook(_attention_hook(name, record)))
                stack.callback(setattr, module, "attend", module.attend)
                module.attend = _attend(name, module, record)
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _embed_hook(record: _Record) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tokens_BT, emb_VE, proj_DE = inputs
        if proj_DE is not None:
            record("embed_proj", rms_norm(F.embedding(tokens_BT, emb_VE)))

    return hook


def _head_hook(record: _Record) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        x_BTD, _, proj_ED = inputs[:3]
        y = rms_norm(x_BTD)
        if proj_ED is not None:
            record("head_proj", y)
            y = F.linear(y, proj_ED)
        record("head", y)

    return hook


def _mlp_hook(name: str, record: _Record) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, MLP)
        x_BTD, norm_BT1 = inputs[:2]
        normed_BTD = (x_BTD * norm_BT1).type_as(x_BTD)
        record(f"{name}.fc", normed_BTD)
        record(f"{name}.proj", F.leaky_relu(module.fc(normed_BTD), 0.5).square())

    return hook


def _attention_hook(name: str, record: _Record) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        record(f"{name}.in", inputs[0])

    return hook


def _attend(name: str, attention: Attention, record: _Record) -> Attend:
    """Return the module's own function, recording its result as the output matrix's input."""
    attend = attention.attend

    def attend_and_record(
        q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None
    ) -> Tensor:
        y_BHTC = attend(q_BHTC, k_BKTC, v_BKTC, documents_BT)
        y_BTHC = y_BHTC.transpose(1, 2)
        if attention.xsa:
            y_BTHC = remove_own_value(y_BTHC, v_BKTC.transpose(1, 2))
        record(f"{name}.proj", y_BTHC.flatten(2))
        return y_BHTC

    return attend_and_record
