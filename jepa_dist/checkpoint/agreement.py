"""Failures become one error that every rank raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World

T = TypeVar("T")


def on_every_rank(work: Callable[[], T], world: World) -> T:
    """Do ``work``, which is not collective, on every rank. Collective.

    Returns:
        This rank's result.

    Raises:
        UserError: on every rank, with the problems of all of them, if any rank has one.
    """
    result, problems = None, []
    try:
        result = work()
    except UserError as error:
        problems = list(error.problems)
    found = list(dict.fromkeys(itertools.chain.from_iterable(world.gather(problems))))
    if found:
        raise UserError(*found)
    return result  # type: ignore[return-value]


def plainly(error: CheckpointException) -> Exception:
    """What PyTorch tells every rank, as an error of ours.

    ``CheckpointException`` is no ``Exception``: handlers would miss it.
    """
    causes = [cause for cause, _ in error.failures.values()]
    told = [cause for cause in causes if isinstance(cause, UserError)]
    if len(told) < len(causes):
        return RuntimeError(f"checkpoint: {error}")
    return UserError(*dict.fromkeys(problem for cause in told for problem in cause.problems))
