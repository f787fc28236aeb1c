"""A part of the launcher's store that only the ranks of one start use.

torchrun hands the same store to every restart, and gloo and NCCL find the addresses of the ranks
that were killed in it ("connectFullMesh ... Connection refused"). Numbers that torchrun gives to
restarts are no remedy: agents count them differently.

So the ranks agree on a fresh prefix. Every other rank asks under a name of its own, and rank 0
answers all it finds with the prefix. What earlier starts asked is answered in vain; nobody else is
left who could answer this one, because torchrun starts ranks when all those before have ended.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from jepa_dist.errors import UserError

_POLL_SECONDS = 0.02


def store_of_this_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return the part of ``store`` that belongs to this start of the ranks. Collective.

    Args:
        store: What the launcher gives, perhaps with what earlier starts left in it.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Longest wait for the others.

    Raises:
        UserError: on rank 0: some of them did not come in time.
        torch.distributed.DistError: on the others: rank 0 did not come in time.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        _answer(store, mine, world_size, timeout)
        return PrefixStore(mine, store)
    number = store.add("start/asked", 1)
    store.set(f"start/ask/{number}", mine)
    answer = f"start/answer/{mine}"
    store.wait([answer], timeout)
    prefix = store.get(answer).decode()
    store.add(f"start/come/{prefix}", 1)
    return PrefixStore(prefix, store)


def _answer(store: Store, prefix: str, world_size: int, timeout: timedelta) -> None:
    """Tell everybody who asks the prefix, until all ranks have it."""
    deadline = time.monotonic() + timeout.total_seconds()
    answered: set[int] = set()
    while (come := store.add(f"start/come/{prefix}", 0)) < world_size - 1:
        for number in range(1, store.add("start/asked", 0) + 1):
            if number not in answered and store.check([f"start/ask/{number}"]):
                asked = store.get(f"start/ask/{number}").decode()
                store.set(f"start/answer/{asked}", prefix)
                answered.add(number)
        if time.monotonic() > deadline:
            raise UserError(
                f"only {come + 1} of {world_size} ranks have come within "
                f"{timeout.total_seconds():g} s (parallel.timeout_seconds); see whether all of "
                "them were started, and whether they reach MASTER_ADDR"
            )
        time.sleep(_POLL_SECONDS)
