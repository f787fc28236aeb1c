"""A prefix of the launcher's store that only the ranks of one start use.

torchrun passes the same store to every restart, and gloo and NCCL would find the addresses of
killed ranks in it ("connectFullMesh ... Connection refused"). torchrun's restart counter cannot
serve as a prefix: agents count restarts differently.

So the ranks agree on a fresh prefix. Every other rank posts a request under a unique name, and rank
0 answers all requests that it finds with the prefix. Requests of earlier starts are answered, too,
but nobody reads the answers. Only this start's rank 0 can answer a request, because torchrun starts
ranks only after all earlier ones have exited.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from jepa_dist.errors import UserError

_POLL_SECONDS = 0.02


def store_of_this_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return ``store`` with a prefix that is unique to this start of the ranks. Collective.

    Args:
        store: The launcher's store, possibly with entries of earlier starts.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Longest wait for the other ranks.

    Raises:
        UserError: on rank 0, if some ranks did not connect in time.
        torch.distributed.DistError: on the others, if rank 0 did not answer in time.
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
    """Answer all requests with the prefix, until all ranks have received it."""
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
                f"only {come + 1} of {world_size} ranks have connected within "
                f"{timeout.total_seconds():g} s (parallel.timeout_seconds); check that all of "
                "them were started, and that they can reach MASTER_ADDR"
            )
        time.sleep(_POLL_SECONDS)
