"""Gloo groups with one worker thread: with two, PyTorch's own bookkeeping corrupts the heap."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d


class _OneWorker(dist.ProcessGroupGloo):
    """What torch creates as a gloo group, except for the number of threads."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        gloo: Any = dist.ProcessGroupGloo  # its type stubs lack what is used here
        options = gloo._Options()
        options._timeout = timeout
        options._threads = 1
        devices = [gloo.create_device(interface=name) for name in names]
        options._devices = devices or [gloo.create_default_device()]
        super().__init__(store, rank, size, options)


def use_one_worker() -> None:
    """Give each gloo group that is created from now on one worker thread instead of two.

    Both of PyTorch's workers write the name of the collective that they have completed into the
    group's status, without a lock (``ProcessGroupGloo::runLoop``, 2.11 to 2.13). If they do so at
    the same time, a string is freed twice, and the process dies sooner or later by SIGSEGV or
    SIGABRT. One after the other suffices: the first worker may still be writing when the second has
    finished the next collective. Names of at most 15 characters are not on the heap: groups that
    only broadcast, gather and reduce, as a GPU run's gloo groups do, are not affected.
    """
    distributed_c10d.ProcessGroupGloo = _OneWorker  # type: ignore[misc]
