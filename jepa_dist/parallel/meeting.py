"""The launcher's store, and a prefix of it that only the ranks of one start use.

torchrun passes the same store to every restart, and gloo and NCCL would find the addresses of
killed ranks in it ("connectFullMesh ... Connection refused"). torchrun's restart counter cannot
serve as a prefix: agents count restarts differently.

So the ranks agree on a fresh prefix. Every other rank posts a request under a unique name, and rank
0 answers all requests that it finds with the prefix. Requests of earlier starts are answered, too,
but nobody reads the answers. Only this start's rank 0 can answer a request, because torchrun starts
ranks only after all earlier ones have exited.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import is_on_one_host, launched_rank
from jepa_dist.process.store import is_loopback, is_own_address, listening_store

_POLL_SECONDS = 0.02


def launcher_store(timeout: timedelta) -> Store:
    """Return the store at MASTER_ADDR and MASTER_PORT: torchrun's, or one that rank 0 serves.

    Rank 0's listens at MASTER_ADDR only. If that is not an address of its host (or, with several
    hosts, a name that resolves to loopback here), it listens on all interfaces, as PyTorch's do.

    Args:
        timeout: Longest wait for the store, and for a key.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun sets it if its agent serves the store.
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if is_served or launched_rank() != 0:
        return TCPStore(address, port, is_master=False, timeout=timeout)
    if is_own_address(address) and (is_on_one_host(os.environ) or not is_loopback(address)):
        return listening_store(address, port, timeout)
    return TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False)


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
