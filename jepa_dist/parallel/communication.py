"""FSDP2's communication: how long computation stands still for it, and how to do without it."""

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

# Methods of FSDP2's parameter groups, which have no public hooks; alike in torch 2.11 and 2.13.
_WAITING_POINTS = ("pre_forward", "pre_backward", "post_backward", "finalize_backward")


def time_communication(model: nn.Module, timed: Callable[[], AbstractContextManager[None]]) -> None:
    """Have every point at which computation may wait for communication run inside ``timed()``.

    FSDP2 overlaps its collectives with computation and reports nothing of what it could not hide.
    But the stream that computes waits for them at four points only: before a unit's forward and
    backward (its parameters must be there), after its backward (the gradients of an earlier unit
    must be on their way), and at the end of backward (all must be reduced). What passes there is
    the communication that is exposed, and the copies into and out of the collectives' buffers.
    """
    for group in _parameter_groups(model):
        for name in _WAITING_POINTS:
            setattr(group, name, _inside(timed, getattr(group, name)))


@contextmanager
def without_communication(model: nn.Module) -> Iterator[None]:
    """In here a rank runs passes over the model by itself; begin the micro-batch before.

    Parameters are zero but for its own part, and gradients (to be thrown away) are not reduced.
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
            group._partial_reduce_output = None  # what replicas would add to their next gradient


class _Zeros:
    """Buffers for collectives that do not take place."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)


class _NoAllGather(_Zeros, AllGather):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Everything but this rank's own part stays zero."""


class _NoReduceScatter(_Zeros, ReduceScatter):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The sum stays zero."""


def _parameter_groups(model: nn.Module) -> list[Any]:
    """Of all units; a module without parameters of its own has none. torch 2.11 knows one each."""
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
