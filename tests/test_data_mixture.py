"""Mixtures of sources: their order, their configuration, their checks and their identity."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_dist.config import Config, as_override, flatten, load, to_dict
from jepa_dist.data.check import check_data
from jepa_dist.data.loader import TokenDataset
from jepa_dist.data.mixture import Mixture, Stage, whole_weights
from jepa_dist.data.order import sample_order
from jepa_dist.data.shards import find_shards, fingerprint, write_shard
from jepa_dist.data.sources import (
    describe_mixture,
    fingerprint_split,
    first_step,
    mixture_metrics,
    training_order,
)
from jepa_dist.errors import UserError
from tests.support.tiny import mixture, tiny_config, write_mixture

weights = st.lists(st.floats(1e-3, 100), min_size=2, max_size=64)


def one_stage(of: list[float], size: int = 10**6) -> Mixture:
    return Mixture([size] * len(of), [Stage(0, whole_weights(of))])


# ---------------------------------------------------------------------------- order


@given(
    n=st.integers(1, 500),
    first=st.integers(0, 2000),
    count=st.integers(0, 50),
    skip=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_one_source_is_the_plain_order(n: int, first: int, count: int, skip: int) -> None:
    passed = range(skip, skip + 7)
    expected = sample_order(first, count, n, 3, passed)
    assert np.array_equal(one_stage([0.3], n).ids(first, count, 3, passed), expected)


@given(of=weights, start=st.integers(0, 10**12))
@settings(max_examples=10, deadline=None)
def test_proportions_hold_over_any_ten_thousand_samples(of: list[float], start: int) -> None:
    order = one_stage(of)
    sources, _ = order.draw(np.arange(start, start + 12_000))
    shares = np.array(of) / sum(of)
    drawn = np.array([sources == k for k in range(len(of))]).cumsum(axis=1)
    windows = drawn[:, 10_000:] - drawn[:, :2000]
    assert np.abs(windows - 10_000 * shares[:, None]).max() < 6 + 1e-4 < 0.001 * 10_000


def test_a_source_of_small_weight_comes_at_even_distances() -> None:
    sources, _ = one_stage([0.97, 0.03]).draw(np.arange(10_000))
    (places,) = np.nonzero(sources == 1)
    assert len(places) == 300
    assert set(np.diff(places).tolist()) == {33, 34}


@given(of=weights, change=st.integers(1, 1000), start=st.integers(0, 1900))
@settings(max_examples=15, deadline=None)
def test_the_closed_form_counts_the_draws(of: list[float], change: int, start: int) -> None:
    """Against a count one by one, across a change of the weights."""
    stages = [Stage(0, whole_weights(of)), Stage(change, whole_weights(of[::-1]))]
    order = Mixture([100] * len(of), stages)
    sources, draws = order.draw(np.arange(2000))
    for source in range(len(of)):
        mine = draws[sources == source]
        assert mine.tolist() == list(range(len(mine)))
    counted = np.bincount(sources[:start], minlength=len(of))
    assert order.draws_before(start) == tuple(counted.tolist())
    cut = [part.tolist() for part in order.draw(np.arange(start, start + 50))]
    assert cut == [sources[start : start + 50].tolist(), draws[start : start + 50].tolist()]


def test_every_source_visits_all_of_its_samples_before_it_repeats_one() -> None:
    sizes = [50, 7, 120]
    order = Mixture(sizes, [Stage(0, (5, 3, 2)), Stage(300, (1, 0, 9))])
    ids = order.ids(0, 1200, seed=1)
    for first, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        mine = ids[(ids >= first) & (ids < first + size)] - first
        for start in range(0, len(mine), size):
            epoch = mine[start : start + size].tolist()
            assert len(set(epoch)) == len(epoch)
    later = ids[300:]
    assert not ((later >= 50) & (later < 57)).any()
    assert set(ids[300:].tolist()) > set(range(57, 177))


def test_sources_of_equal_size_have_different_orders() -> None:
    order = one_stage([0.5, 0.5], 1000)
    ids = order.ids(0, 2000, seed=0)
    first, second = ids[ids < 1000], ids[ids >= 1000] - 1000
    assert (first == second).sum() < 15


def test_huge_mixtures_need_no_memory() -> None:
    order = Mixture([10**15, 10**14, 3], [Stage(0, whole_weights([0.6, 0.3, 0.1]))])
    tracemalloc.start()
    ids = order.ids(10**17, 1000, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    assert 0 <= ids.min() < ids.max() < 10**15 + 10**14 + 3


def test_the_order_is_pinned() -> None:
    """A change here would silently break every resumed run of a mixture."""
    order = Mixture([1000, 50], [Stage(0, whole_weights([0.7, 0.3]))])
    assert order.ids(0, 10, seed=0).tolist() == PINNED


PINNED = [1043, 729, 856, 1000, 108, 413, 1026, 586, 420, 603]


def test_representable_weights_are_exact() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == (700_000_000, 200_000_000, 100_000_000)
    assert whole_weights([2, 0, 1e-12]) == (10**9, 0, 1)


@pytest.mark.parametrize(("at", "steps", "first"), [(0.8, 1000, 800), (0.7, 10, 7), (0.5, 5, 3)])
def test_stages_begin_at_whole_steps(at: float, steps: int, first: int) -> None:
    assert first_step(at, steps) == first


# ---------------------------------------------------------------------------- configuration


def test_a_list_survives_files_and_the_command_line(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **MIXED)
    again = load(None, [as_override(k, v) for k, v in flatten(to_dict(config))], {}).config
    assert again == config
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n  train:\n    - {name: a, shards: 'x/*.bin', weight: 3}\n"
        "    - {name: b, shards: y.bin, epochs_at_most: 2}\n"
        "  stages:\n    - at: 0.8\n      weights: {a: 1, b: 2}\n"
    )
    data = load(path, [], {}).config.data
    assert [source.weight for source in data.train] == [3.0, 1.0]
    assert data.stages[0].weights == {"a": 1.0, "b": 2.0}


MIXED = {
    "data__train": '[{"name": "a", "shards": "x"}, {"name": "b", "shards": "y"}]',
    "data__val": '[{"name": "a", "shards": "v"}]',
    "data__stages": '[{"at": 0.5, "weights": {"a": 1, "b": 3}}]',
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__val": '[{"name": "a/b", "shards": "v"}]'}, r"data\.val\[0\]\.name='a/b'"),
        ({"data__val": '[{"name": "a"}]'}, r"data\.val\[0\]\.shards=.*Field required"),
        ({"data__val": '[{"name": "a", "shards": ""}]'}, r"data\.val\[0\]\.shards=.*empty"),
        ({"data__train": "x.bin"}, "data.stages: only a data.train that is a list"),
        ({"train__max_wallclock_seconds": 5}, "not known in advance"),
        ({"data__stages": '[{"at": 0.5, "weights": {"a": 1}}]'}, "expected one for each source"),
        ({"data__stages": '[{"at": 0.5, "weights": {"a": 0, "b": 0}}]'}, "are all 0"),
        ({"data__train": '[{"name": "a", "shards": "x", "weight": 0}]'}, "are all 0; at least"),
        ({"data__train": MIXED["data__train"].replace('"b"', '"a"')}, "2 sources are named a"),
    ],
)
def test_invalid_lists_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, **{**MIXED, **changes})


# ---------------------------------------------------------------------------- data


def test_a_list_of_one_source_is_the_pattern(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    listed = f'[{{"name": "a", "shards": "{tmp_path}/train_*.bin", "weight": 1}}]'
    plain, single = tiny_config(tmp_path), tiny_config(tmp_path, data__train=listed)
    expected = fingerprint(find_shards(f"{tmp_path}/train_*.bin", ""))
    assert fingerprint_split(plain, "train") == fingerprint_split(single, "train") == expected
    one, other = training_order(plain), training_order(single)
    ids = sample_order(0, 500, one.sizes[0], 0)
    assert np.array_equal(one.ids(0, 500, 0), ids)
    assert np.array_equal(other.ids(0, 500, 0), ids)


def test_the_fingerprint_covers_what_the_order_depends_on(tmp_path: Path) -> None:
    mixed = write_mixture(tmp_path)
    found = fingerprint_split(tiny_config(tmp_path, **mixed), "train")
    assert [file["name"] for file in found["files"]] == [
        *("walk/train_0.bin", "walk/train_1.bin", "other/train_0.bin")
    ]
    assert found["tokens"] == sum(part["tokens"] for part in found["sources"].values())
    other_weight = mixed["data__train"].replace('"weight": 0.7', '"weight": 0.6')
    for changes in (
        {"data__train": other_weight},
        {"data__stages": "[]"},
        {"train__steps": 30},
        {"batch__sequences": 8},
    ):
        changed = fingerprint_split(tiny_config(tmp_path, **{**mixed, **changes}), "train")
        assert changed["digest"] != found["digest"], changes
    limited = mixed["data__train"].replace('"weight": 0.7', '"weight": 0.7, "epochs_at_most": 9')
    same = fingerprint_split(tiny_config(tmp_path, **{**mixed, "data__train": limited}), "train")
    assert same == found


def test_the_dataset_reads_the_windows_of_the_sources(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__steps=20, **write_mixture(tmp_path))
    order, paths = training_order(config), sorted(tmp_path.glob("**/train_*.bin"))
    walk, other = [p for p in paths if "other" not in p.parts], [tmp_path / "other/train_0.bin"]
    data = TokenDataset([*walk, *other], 24, 257, shards=[2, 1], stages=order.stages)
    assert data.order.sizes == order.sizes
    sources, _ = order.draw(np.arange(60))
    rows = data.read(order.ids(0, 60, config.seed))
    steps = np.abs(np.diff(rows))  # at most 2 in a walk, which wraps around at 61
    assert np.array_equal(((steps > 2) & (steps < 59)).any(axis=1), sources == 1)
    assert sources.sum() == 18


def test_the_mixture_is_printed_at_the_start_and_recorded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **write_mixture(tmp_path))
    order = training_order(config)
    first, second = describe_mixture(config, order)
    assert first.startswith("mixture from step 0 on: walk 70.00% (")
    assert second.startswith("mixture from step 6 on: walk 25.00% (")
    metrics = mixture_metrics(config, order, 36, 42)
    assert metrics["mixture/share/walk"] == 0.25
    drawn = np.bincount(order.draw(np.arange(42))[0])
    assert metrics["mixture/epochs/other"] == drawn[1] / order.sizes[1]
    assert mixture_metrics(tiny_config(tmp_path), order, 0, 6) == {}


def checked(folder: Path, **changes: Any) -> Config:
    mixed = write_mixture(folder)
    sizes = {"model__vocab_size": 61, "data__tokenizer": "null"}
    config = tiny_config(folder, **{**mixed, **sizes, **changes})
    check_data(config)
    return config


def test_checks_cover_every_source(tmp_path: Path) -> None:
    checked(tmp_path)
    write_shard(tmp_path / "other" / "train_0.bin", np.arange(5))
    with pytest.raises(UserError) as error:
        check_data(tiny_config(tmp_path, **mixture(tmp_path)))
    (problem, *_) = error.value.problems
    assert problem.startswith("data.train[1].shards=")
    assert "no shard holds one window" in problem
    (tmp_path / "other" / "train_0.bin").unlink()
    with pytest.raises(UserError, match=r"data\.train\[1\]\.shards='.*': no token shard matches"):
        check_data(tiny_config(tmp_path, **mixture(tmp_path)))


def test_epochs_at_most_is_checked_with_the_numbers(tmp_path: Path) -> None:
    mixed = write_mixture(tmp_path)["data__train"]
    limit = mixed.replace('"weight": 0.3', '"weight": 0.3, "epochs_at_most": 2')
    checked(tmp_path, data__train=limit)
    with pytest.raises(UserError, match=r"other: epochs_at_most=2, but the run's 1,200 sequences"):
        checked(tmp_path, data__train=limit, train__steps=200)
