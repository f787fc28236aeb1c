"""Turn a failure on any rank into one error that every rank raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from jepa_dist.errors import SharedError, UserError
from jepa_dist.parallel.world import World

T = TypeVar("T")


def on_every_rank(work: Callable[[], T], world: World) -> T:
    """Run ``work``, which must not be collective itself, on every rank. Collective.

    Returns:
        This rank's result.

    Raises:
        SharedError: on every rank, with the problems of all ranks, if ``work`` raised it on any.
    """
    result, problems = None, []
    try:
        result = work()
    except UserError as error:
        problems = list(error.problems)
    found = list(dict.fromkeys(itertools.chain.from_iterable(world.gather(problems))))
    if found:
        raise SharedError(*found)
    return result  # type: ignore[return-value]


def unwrap_checkpoint_exception(error: CheckpointException) -> Exception:
    """Return a ``SharedError`` with the problems of all ranks if each that failed did so with a
    ``UserError``, else a ``RuntimeError``. Every rank has the same exception.

    ``CheckpointException`` is not a subclass of ``Exception``, so that handlers would miss it.
    """
    causes = [cause for cause, _ in error.failures.values()]
    user_errors = [cause for cause in causes if isinstance(cause, UserError)]
    if len(user_errors) < len(causes):
        return RuntimeError(f"checkpoint: {error}")
    return SharedError(*dict.fromkeys(problem for each in user_errors for problem in each.problems))
