"""Allocator and compiler variables: defaults, which the user's values override."""

from __future__ import annotations

import os

import pytest

from jepa_dist.process.variables import set_defaults

ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without the variables; ``setenv`` first, so that all of them are restored."""
    for name in (ALLOCATOR, OLD_ALLOCATOR, THREADS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(96, 8, "12"), (96, 1, "32"), (2, 8, "1"), (64, 2, "32")]
)
def test_defaults(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    set_defaults(ranks)
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
    assert os.environ[THREADS] == threads


@pytest.mark.parametrize("name", [ALLOCATOR, OLD_ALLOCATOR])
def test_variables_of_the_user_take_precedence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    monkeypatch.setenv(THREADS, "3")
    set_defaults(8)
    found = {os.environ.get(ALLOCATOR), os.environ.get(OLD_ALLOCATOR)} - {None}
    assert found == {"max_split_size_mb:512"}
    assert os.environ[THREADS] == "3"
