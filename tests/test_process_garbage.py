"""Garbage is collected at the scheduled steps only."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from jepa_dist.process.garbage import ScheduledCollection, collection_paused


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Return the generations of the collections that have begun."""
    seen: list[int] = []

    def observe(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(observe)
    yield seen
    gc.callbacks.remove(observe)


def _make_garbage() -> None:
    for _ in range(5000):
        cycle: list[object] = []
        cycle.append(cycle)


def test_collects_when_due_and_after_new_graphs(collections: list[int]) -> None:
    garbage = ScheduledCollection(every=4)
    try:
        collections.clear()
        due = {}
        for step in range(10):
            _make_garbage()
            assert collections == []
            garbage.after_step(step, graphs=3 if step < 5 else 4)
            due[step] = list(collections)
            collections.clear()
        # The first step, step 3 (the fourth), step 5 (a new graph), step 7.
        assert [step for step, seen in due.items() if seen] == [0, 3, 5, 7]
        assert all(seen in ([], [2]) for seen in due.values())
        assert gc.get_freeze_count() > 0
    finally:
        garbage.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_zero_keeps_automatic_collection(collections: list[int]) -> None:
    garbage = ScheduledCollection(every=0)
    _make_garbage()
    assert gc.isenabled()
    assert collections
    collections.clear()
    garbage.after_step(0, graphs=1)
    assert collections == []
    garbage.close()


def test_nested_contexts_keep_automatic_collection_off() -> None:
    outer = ScheduledCollection(every=4)
    try:
        ScheduledCollection(every=4).close()
        assert not gc.isenabled()
    finally:
        outer.close()
    assert gc.isenabled()


def test_imports_are_not_interrupted_by_collections(collections: list[int]) -> None:
    try:
        collections.clear()
        with collection_paused():
            _make_garbage()
            assert collections == []
        assert gc.isenabled()
        assert gc.get_freeze_count() > 5000
        gc.disable()
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
