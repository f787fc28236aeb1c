"""Rendezvous of one start's ranks in a store that earlier starts have used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from jepa_dist.errors import UserError
from jepa_dist.parallel.meeting import store_of_this_start

SOON = timedelta(seconds=20)


def meet(store: Store, world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as pool:
        ranks = range(world_size)
        found = pool.map(lambda r: store_of_this_start(store, r, world_size, SOON), ranks)
        return list(found)


def test_each_start_has_its_own_prefix() -> None:
    store = HashStore()
    first = meet(store, 4)
    first[0].set("address", "of the dead")
    assert first[3].get("address") == b"of the dead"
    second = meet(store, 3)  # a rank was lost
    assert not second[1].check(["address"])
    second[0].set("address", "of the living")
    assert second[2].get("address") == b"of the living"


def test_ranks_killed_during_the_rendezvous_do_not_block_the_next_start() -> None:
    store = HashStore()
    store.add("start/asked", 2)  # one of them died before it asked
    store.set("start/ask/2", "dead")
    one, other = meet(store, 2)
    one.set("x", "1")
    assert other.get("x") == b"1"


def test_missing_ranks_are_reported() -> None:
    with pytest.raises(UserError, match="only 1 of 3 ranks have connected within"):
        store_of_this_start(HashStore(), 0, 3, timedelta(seconds=0.1))


def test_a_late_first_rank_is_waited_for() -> None:
    store = HashStore()
    timer = threading.Timer(0.2, lambda: store_of_this_start(store, 0, 2, SOON))
    timer.start()
    store_of_this_start(store, 1, 2, SOON)
    timer.join()
