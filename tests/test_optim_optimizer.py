"""The composed optimizer, clipping and EMA: in one process, on ranks, and across world sizes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jepa_dist.config import OptimConfig
from jepa_dist.optim.clip import clip_grad_norm
from jepa_dist.optim.ema import EMA
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.muon import MuonSettings
from jepa_dist.optim.optimizer import Optimizer
from tests.support.ranks import run_ranks

SHAPES = {
    "tok_emb.weight": [11, 6],
    "lm_head.weight": [11, 6],
    "blocks.0.attn.c_q.weight": [7, 6],
    "blocks.0.mlp.fc.weight": [1, 6],
    "blocks.0.attn_scale": [6],
    "blocks.0.resid_mix": [2, 6],
    "blocks.0.attn.q_gain": [3],
    "skip_weights": [5, 6],
}
IDLE = "blocks.0.attn.q_gain"  # has no gradient in the first step


def _numbers(shape: list[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parameters() -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(_numbers(s, i)) for i, (n, s) in enumerate(SHAPES.items())}


def _sharded(world_size: int, replicas: int = 1) -> dict[str, nn.Parameter]:
    """Return the same parameters under fully_shard, by their dotted names."""
    net = nn.Module()
    for name, parameter in _parameters().items():
        net.register_parameter(name.replace(".", "/"), parameter)
    shape, names = (replicas, world_size // replicas), ("dp_replicate", "dp_shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(net, mesh=mesh if replicas > 1 else mesh["dp_shard"])
    return {name.replace("/", "."): p for name, p in net.named_parameters()}


def _set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    for index, (name, p) in enumerate(named.items()):
        full = _numbers(SHAPES[name], 100 * (step + 1) + index)
        if isinstance(p, DTensor):
            full = distribute_tensor(full, p.device_mesh, p.placements)
        p.grad = None if name == IDLE and step == 0 else full


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _optimizer(named: dict[str, nn.Parameter], matrix: str = "muon") -> Optimizer:
    config = OptimConfig(matrix=matrix, matrix_lr=0.02, tied_embed_lr=0.03, head_lr=0.05)
    return Optimizer(group_parameters(named.items(), config, tied=False), MuonSettings())


def _train(named, optimizer: Optimizer, ema: EMA, steps) -> None:
    for step in steps:
        _set_gradients(named, step)
        clip_grad_norm(named.values(), 0.5)
        optimizer.set_schedule(1.0 / (step + 1), 0.9)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def _everything(named, optimizer: Optimizer, ema: EMA) -> dict[str, torch.Tensor]:
    parameters = {f"model/{name}": p.detach() for name, p in named.items()}
    return parameters | optimizer.state_tensors() | ema.state_tensors()


def _trained(named) -> dict[str, torch.Tensor]:
    optimizer, ema = _optimizer(named), EMA(named.items(), 0.9)
    _train(named, optimizer, ema, range(3))
    return {key: _full(tensor) for key, tensor in _everything(named, optimizer, ema).items()}


def _trained_on_ranks(rank: int, world_size: int, replicas: int) -> dict[str, torch.Tensor]:
    return _trained(_sharded(world_size, replicas))


# ---------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_adam_groups_equal_torch(matrix):
    named, mirror = _parameters(), _parameters()
    optimizer = _optimizer(named, matrix)
    config = OptimConfig(matrix_lr=0.02, tied_embed_lr=0.03, head_lr=0.05)
    members = group_parameters(mirror.items(), config, tied=False)
    adams = [
        torch.optim.AdamW(
            g.parameters.values(), g.lr, g.betas, g.eps, g.weight_decay, foreach=False
        )
        for g in members
    ]
    for step in range(4):
        optimizer.set_schedule(1.0 / (step + 1), 0.9)
        for adam, group in zip(adams, members, strict=True):
            adam.param_groups[0]["lr"] = group.lr / (step + 1)
        for parameters in (named, mirror):
            _set_gradients(parameters, step)
        optimizer.step()
        for adam in adams:
            adam.step()
    for group in members:
        for name in group.parameters:
            if group.name != "matrix" or matrix == "adamw":
                torch.testing.assert_close(named[name], mirror[name])
    steps = {n: t.item() for n, t in optimizer.state_tensors().items() if n.startswith("adam_step")}
    assert steps.pop(f"adam_step/{IDLE}") == 3
    assert set(steps.values()) == {4}


def test_schedule_scales_every_rate_and_zero_grad_drops():
    named = _parameters()
    optimizer = _optimizer(named)
    optimizer.set_schedule(0.5, 0.9)
    rates = {"tok": 0.3, "head": 0.025, "matrix": 0.01, "scalar": 0.01}
    assert optimizer.learning_rates() == pytest.approx(rates)
    _set_gradients(named, 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in named.values())


def test_state_is_complete_before_the_first_step():
    named = _parameters()
    optimizer = _optimizer(named)
    before = set(optimizer.state_tensors())
    assert "momentum/blocks.0.attn.c_q.weight" in before
    assert {f"{k}/lm_head.weight" for k in ("exp_avg", "exp_avg_sq", "adam_step")} <= before
    _set_gradients(named, 1)
    optimizer.step()
    assert set(optimizer.state_tensors()) == before


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (3, 1), (4, 1), (4, 2)])
def test_ranks_equal_a_single_process(world_size, replicas):
    expected = _trained(_parameters())
    for found in run_ranks(_trained_on_ranks, world_size, replicas):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=2e-6, msg=key)


# ---------------------------------------------------------------------------- clipping


LIMITS = [0.0, 0.3, 1e6]


def _clip(rank: int, world_size: int, replicas: int):
    named = _sharded(world_size, replicas)
    return [_clip_once(named, max_norm) for max_norm in LIMITS]


def _clip_once(named, max_norm: float):
    _set_gradients(named, 0)
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    norm = clip_grad_norm(named.values(), max_norm)
    dist.all_reduce = original
    return norm, len(calls), {n: _full(p.grad) for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_clip_equals_torch(world_size, replicas):
    named = _parameters()
    for results in run_ranks(_clip, world_size, replicas):
        for max_norm, (norm, collectives, gradients) in zip(LIMITS, results, strict=True):
            _set_gradients(named, 0)
            expected = nn.utils.clip_grad_norm_(named.values(), max_norm or float("inf"))
            assert (norm.dtype, norm.shape) == (torch.float32, ())
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            assert collectives == (world_size // replicas > 1)
            assert gradients.keys() == {n for n, p in named.items() if p.grad is not None}
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, named[name].grad)


def test_clip_of_plain_tensors_and_of_nothing():
    named = _parameters()
    assert clip_grad_norm(named.values(), 1.0) == 0
    _set_gradients(named, 0)
    gradients = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    torch.testing.assert_close(clip_grad_norm(named.values(), 0.3), gradients.norm())
    torch.testing.assert_close(clip_grad_norm(named.values(), 0.0), torch.tensor(0.3))


# ---------------------------------------------------------------------------- EMA


def test_ema_follows_the_recursion():
    named = _parameters()
    ema = EMA(named.items(), 0.75)
    expected = {name: p.detach().clone() for name, p in named.items()}
    for step in range(3):
        for name, p in named.items():
            p.data += step + 1
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach()
        ema.update()
    for name, average in ema.state_tensors().items():
        torch.testing.assert_close(average, expected[name.removeprefix("ema/")])


def _swap_and_fail(ema: EMA, named, average) -> None:
    with ema.swap():
        assert all(torch.equal(p, average[f"ema/{name}"]) for name, p in named.items())
        raise KeyError("stop")


def test_ema_swap_gives_back_every_bit_even_after_an_exception():
    named = _parameters()
    ema = EMA(named.items(), 0.5)
    for p in named.values():
        p.data *= 3.1
    live = {name: p.detach().clone() for name, p in named.items()}
    average = {name: t.clone() for name, t in ema.state_tensors().items()}
    places = {name: p.data_ptr() for name, p in named.items()}
    with pytest.raises(KeyError, match="stop"):
        _swap_and_fail(ema, named, average)
    assert all(torch.equal(p, live[name]) for name, p in named.items())
    assert all(torch.equal(t, average[name]) for name, t in ema.state_tensors().items())
    assert places == {name: p.data_ptr() for name, p in named.items()}


def test_ema_refuses_other_dtypes():
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"parameter gain: is torch\.bfloat16"):
        EMA([("gain", half)], 0.9)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_numbers([5, 3], 7))

    def forward(self, x):
        return x @ self.weight.T


def _evaluate_swapped(rank: int, world_size: int) -> list[torch.Tensor]:
    model = _Linear()
    fully_shard(model)
    ema = EMA(model.named_parameters(), 0.0)
    outputs, x = [], torch.ones(2, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().mul_(2)
        outputs.append(model(x))
        model.reshard()
        with ema.swap():
            outputs.append(model(x))
            model.reshard()
        outputs.append(model(x))
    return outputs


def test_ema_swap_reaches_the_sharded_forward():
    for live, averaged, again in run_ranks(_evaluate_swapped, 2):
        torch.testing.assert_close(live, 2 * averaged)
        assert torch.equal(live, again)


# ---------------------------------------------------------------------------- elastic state


def _save(rank: int, world_size: int, folder: str) -> None:
    named = _sharded(world_size)
    optimizer, ema = _optimizer(named), EMA(named.items(), 0.9)
    _train(named, optimizer, ema, range(2))
    dcp.save(_everything(named, optimizer, ema), checkpoint_id=folder)


def _load_and_save(rank: int, world_size: int, old: str, new: str) -> None:
    named = _sharded(world_size)
    optimizer, ema = _optimizer(named), EMA(named.items(), 0.9)
    dcp.load(_everything(named, optimizer, ema), checkpoint_id=old)
    dcp.save(_everything(named, optimizer, ema), checkpoint_id=new)


def _load_and_finish(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    named = _sharded(world_size)
    optimizer, ema = _optimizer(named), EMA(named.items(), 0.9)
    dcp.load(_everything(named, optimizer, ema), checkpoint_id=folder)
    _train(named, optimizer, ema, [2])
    return {key: _full(tensor) for key, tensor in _everything(named, optimizer, ema).items()}


def test_state_survives_changes_of_world_size(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_ranks(_save, 4, first)
    run_ranks(_load_and_save, 2, first, second)
    found = run_ranks(_load_and_finish, 3, second)[0]
    expected = _trained(_parameters())
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=2e-6, msg=key)
