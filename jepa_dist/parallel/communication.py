"""Measure the exposed time of FSDP2's communication, and run passes without communication."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from jepa_dist.parallel.shard import fsdp_modules

# Methods of FSDP2's parameter groups, which have no public hooks; the same in torch 2.11 and 2.13.
_WAITING_POINTS = ("pre_forward", "pre_backward", "post_backward", "finalize_backward")


def time_communication(model: nn.Module, timed: Callable[[], AbstractContextManager[None]]) -> None:
    """Run every point at which computation may wait for communication inside ``timed()``.

    FSDP2 overlaps its collectives with computation, and does not report what it could not hide.
    But the compute stream waits for them at four points only: before a unit's forward and
    backward (for its parameters), after its backward (for the reduction of an earlier unit to be
    launched), and at the end of backward (for all reductions). The time spent there is the exposed
    communication, and the copies into and out of the collectives' buffers.
    """
    for group in _parameter_groups(model):
        for name in _WAITING_POINTS:
            setattr(group, name, _inside(timed, getattr(group, name)))


@contextmanager
def without_communication(model: nn.Module) -> Iterator[None]:
    """Let this rank run passes over the model alone, inside this context.

    Start the micro-batch before entering it. Parameters are zero except this rank's shards, and
    gradients, which must be discarded, are not reduced.
    """
    for module in fsdp_modules(model):
        module.set_custom_all_gather(_NoAllGather())
        module.set_custom_reduce_scatter(_NoReduceScatter())
        module.set_requires_all_reduce(False)
    try:
        yield
    finally:
        for module in fsdp_modules(model):
            module.set_custom_all_gather(DefaultAllGather())
            module.set_custom_reduce_scatter(DefaultReduceScatter())
            module.set_requires_all_reduce(True)
        for group in _parameter_groups(model):
            group._partial_reduce_output = None  # would be added to the next gradient with replicas


class _Zeros:
    """Allocator of zeroed buffers for skipped collectives."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)


class _NoAllGather(_Zeros, AllGather):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: all but this rank's shard stays zero."""


class _NoReduceScatter(_Zeros, ReduceScatter):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the sum stays zero."""


def _parameter_groups(model: nn.Module) -> list[Any]:
    """Return all units' groups; a module without parameters has none. torch 2.11 has one each."""
    states: list[Any] = [module._get_fsdp_state() for module in fsdp_modules(model)]
    groups: list[Any] = []
    for state in states:
        many = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if many is None else many
    return [group for group in groups if group is not None]


def _inside(
    timed: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with timed():
            return function(*args, **kwargs)

    return wrapped
