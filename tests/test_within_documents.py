"""``jepa.within_documents``: spans that do not cross documents, on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jepa_dist.build import build_document_starts
from jepa_dist.config import Config, check, load
from jepa_dist.data.boundaries import DocumentStarts
from jepa_dist.data.check import check_data, known_bos
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import TokenDataset, TrainLoader
from jepa_dist.data.shards import find_shards, write_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.objectives.objective import Samples
from jepa_dist.objectives.span_loss import span_loss
from jepa_dist.objectives.spans import sample_spans_within
from jepa_dist.parallel.world import World, start_world
from jepa_dist.plan import Planner, SamplesAhead, TrainingClock
from tests.support.objective import SAMPLERS, first_forward
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, train
from tests.support.tiny import tiny_config, tiny_overrides

BOS = 7
Starts = NDArray[np.bool_]


# ------------------------------------------------------------------ sampling


def legal_spans(starts: Starts, fraction: float) -> list[tuple[int, int]]:
    """Return the legal spans of one row, from the definition."""
    length = len(starts)
    document = np.cumsum(starts)
    return [
        (a, b)
        for a in range(1, length)
        for b in range(a, length)
        if document[a - 1] == document[b]
        and b - a + 1 <= max(1, math.floor(fraction * length))
        and (a, b) != (1, length - 1)
    ]


@st.composite
def batches(draw: Any) -> Starts:
    """Document starts of a few rows, from none to one at every position."""
    seq_len = draw(st.integers(3, 40))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    seed = draw(st.integers(0, 2**32))
    return np.random.default_rng(seed).random((4, seq_len)) < density


@given(
    seed=st.integers(0, 2**63),
    step=st.integers(0, 2**40),
    starts=batches(),
    fraction=st.floats(0, 1),
    sampler=st.sampled_from(SAMPLERS),
)
def test_spans_stay_within_documents(seed, step, starts, fraction, sampler) -> None:
    spans = sample_spans_within(seed, step, starts, 3, fraction, sampler)
    assert spans.shape == (4, 3, 2)
    assert spans.dtype == np.int64
    for row, row_spans in zip(starts, spans.tolist(), strict=True):
        legal = legal_spans(row, fraction) or [(0, 0)]
        assert {tuple(span) for span in row_spans} <= set(legal)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_distribution_is_the_exact_one(fraction: float, sampler: str) -> None:
    draws = 40_000
    rows = np.zeros((3, 10), dtype=bool)
    rows[1, [0, 4, 5, 8]] = True
    rows[2, 1:] = True  # no span at all
    spans = sample_spans_within(1, 2, rows, draws, fraction, sampler)
    for row, row_spans in zip(rows[:2], spans[:2], strict=True):
        found, counts = np.unique(row_spans, axis=0, return_counts=True)
        seen = dict(zip(map(tuple, found.tolist()), (counts / draws).tolist(), strict=True))
        legal = legal_spans(row, fraction)
        starts = {a for a, _ in legal}
        assert seen.keys() == set(legal)
        for a, b in legal:
            same_start = sum(x == a for x, _ in legal)
            exact = 1 / len(legal) if sampler == "uniform" else 1 / len(starts) / same_start
            sigma = math.sqrt(exact * (1 - exact) / draws)
            assert abs(seen[a, b] - exact) <= 5 * sigma + 1e-12
    assert not spans[2].any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_spans_are_a_function_of_seed_step_and_tokens(sampler: str) -> None:
    starts = np.random.default_rng(0).random((32, 64)) < 0.05

    def draw(seed: int = 1, step: int = 7, starts: Starts = starts) -> NDArray[np.int64]:
        return sample_spans_within(seed, step, starts, 1, 0.5, sampler)

    assert np.array_equal(draw(), draw())
    assert not np.array_equal(draw(), draw(step=8))
    assert not np.array_equal(draw(), draw(seed=2))
    assert not np.array_equal(draw(), draw(starts=~starts))


# ------------------------------------------------------------------ the rows of a step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some ten tokens, and a section of BOS only."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for name, count in (("train_0", 6000), ("train_1", 777), ("val_0", 500)):
        tokens = np.cumsum(generator.integers(-2, 3, count)) % 61
        tokens[tokens == BOS] = BOS + 1
        tokens[generator.random(count) < 0.1] = BOS
        tokens[count // 2 : count // 2 + 100] = BOS
        write_shard(folder / f"{name}.bin", tokens.astype(np.uint16))
    return folder


def config_for(corpus: Path, **changes: Any) -> Config:
    return tiny_config(corpus, jepa__within_documents=True, data__bos_id=BOS, **changes)


def dataset(config: Config) -> TokenDataset:
    paths = find_shards(config.data.train, "data.train")
    return TokenDataset(paths, config.model.seq_len, config.model.vocab_size)


@pytest.mark.parametrize("skip", [range(0), range(120, 150)])
def test_boundaries_are_those_of_the_batches(corpus: Path, skip: range) -> None:
    """Of the rows that the loader yields, from any step on, over epochs."""
    config = config_for(corpus)
    data, (step, consumed) = dataset(config), (5, 36)
    documents = DocumentStarts(
        data, BOS, sequences=6, seed=3, step=step, samples_consumed=consumed, skip=skip
    )
    layout = BatchLayout(sequences=6, micro=6, rank=0, world_size=1)
    loader = TrainLoader(data, layout, seed=3, samples_consumed=consumed, skip=skip)
    for number in range(step, step + 60):
        assert np.array_equal(documents.read(number), next(loader).tokens.numpy() == BOS)


def test_spans_ahead_are_those_of_the_step_asked_for() -> None:
    asked = []

    def sample(step: int) -> Samples:
        asked.append(step)
        return np.full((1, 1, 2), step)

    ahead = SamplesAhead(sample)
    order = [3, 4, 5, 9, 10, 4]
    assert [int(ahead(step)[0, 0, 0]) for step in order] == order
    assert asked[:3] == [3, 4, 5]


def test_an_error_ahead_is_raised_when_its_step_comes() -> None:
    def sample(step: int) -> Samples:
        if step == 2:
            raise UserError("a damaged shard")
        return np.zeros((1, 1, 2), dtype=np.int64)

    ahead = SamplesAhead(sample)
    ahead(0)
    ahead(1)
    with pytest.raises(UserError, match="damaged"):
        ahead(2)


def planned(rank: int, world_size: int, config: Config) -> list[tuple[Starts, NDArray]]:
    world = start_world(config.parallel)
    where = {"step": 0, "consumed": 0, "skip": range(0)}
    documents = build_document_starts(config, world, BOS, **where)
    planner = Planner(config, TrainingClock(), documents=documents)
    reader = build_document_starts(config, world, BOS, **where)
    return [(reader.read(step), planner.plan(step).samples) for step in range(20)]


def test_planned_spans_stay_within_the_documents_of_their_rows(corpus: Path) -> None:
    config = config_for(corpus, jepa__spans_per_sequence=2)
    seen = run_ranks(planned, 1, config)[0]
    without = 0
    for starts, spans in seen:
        for row, pairs in zip(starts, spans.tolist(), strict=True):
            legal = legal_spans(row, config.jepa.max_span_frac)
            assert {tuple(pair) for pair in pairs} <= set(legal or [(0, 0)])
            without += not legal
    assert without > 0  # the section of BOS was read


# ------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def single(corpus: Path) -> list[dict[str, Any]]:
    return run_ranks(train, 1, config_for(corpus))[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree(corpus: Path, world_size: int, single: list[dict[str, Any]]) -> None:
    ours = run_ranks(train, world_size, config_for(corpus))[0]
    assert_same_run(ours, single)
    assert [r["spans_digest"] for r in ours] == [r["spans_digest"] for r in single]


def test_sequences_without_a_span_are_counted_and_left_out(corpus: Path, tmp_path: Path) -> None:
    """The mean is over the others: against a plain model on those."""
    tokens = np.random.default_rng(1).integers(BOS + 1, 61, 6000).astype(np.uint16)
    for start in range(0, 6000, 48):  # every other window of 24
        tokens[start : start + 25] = BOS
    write_shard(tmp_path / "train_0.bin", tokens)
    config = config_for(corpus, data__train=tmp_path / "train_*.bin", train__steps=2)
    starts, spans = run_ranks(planned, 1, config)[0][0]
    has_span = torch.from_numpy(spans[:, 0, 0] > 0)
    assert has_span.tolist() == [bool(legal_spans(row, 0.5)) for row in starts]
    assert 0 < has_span.sum() < 6
    h, chosen = first_forward(config).taps[0][has_span], torch.from_numpy(spans)[has_span]
    expected = span_loss(h, chosen, torch.ones(len(h)), config.jepa.norm_floor)[0] / len(h)
    for world_size in (1, 2):
        seen = run_ranks(train, world_size, config)[0][0]
        assert seen["loss/jepa"] == pytest.approx(expected.item(), rel=1e-5)
        assert seen["jepa/rows_without_span"] == 6 - len(h)


def test_off_by_default_and_then_other_spans(corpus: Path, single: list[dict[str, Any]]) -> None:
    plain = run_ranks(train, 1, tiny_config(corpus, train__steps=3))[0]
    assert "jepa/rows_without_span" not in plain[0]
    assert plain[0]["spans_digest"] != single[0]["spans_digest"]
    assert plain[0]["tokens_digest"] == single[0]["tokens_digest"]


# ------------------------------------------------------------------ which id begins a document


def test_precedence_of_bos_id_sources(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    assert known_bos(config_for(corpus), tokenizer) == BOS
    assert known_bos(tiny_config(corpus), tokenizer) == 256
    assert known_bos(tiny_config(corpus, data__tokenizer="null"), None) is None
    meta = {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 5, "shards": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "train_0.bin").write_bytes((corpus / "train_0.bin").read_bytes())
    elsewhere = tiny_config(corpus, data__train=tmp_path / "train_*.bin")
    assert known_bos(elsewhere, tokenizer) == 5


def test_an_unknown_bos_is_refused(corpus: Path) -> None:
    config = tiny_config(corpus, data__tokenizer="null", jepa__within_documents=True)
    with pytest.raises(UserError, match=r"jepa\.within_documents=true.*set data\.bos_id"):
        check_data(config)


def test_shards_without_any_bos_are_refused(corpus: Path) -> None:
    config = tiny_config(corpus, jepa__within_documents=True)
    with pytest.raises(UserError, match=r"train_0\.bin: id 256 does not occur"):
        check_data(config)
    check_data(config_for(corpus))


def test_a_bos_outside_the_vocabulary_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"data\.bos_id=300: must be below model\.vocab_size=257"):
        load(None, tiny_overrides(corpus, data__bos_id=300), {})
    assert check(config_for(corpus)) == []


def test_only_rank_0_reads_the_rows(corpus: Path) -> None:
    where = {"step": 0, "consumed": 0, "skip": range(0)}

    def built(config: Config, is_main: bool) -> DocumentStarts | None:
        @dataclasses.dataclass
        class Ranks:
            is_main: bool

        world: World = Ranks(is_main)  # type: ignore[assignment]
        return build_document_starts(config, world, BOS, **where)

    assert built(config_for(corpus), is_main=True) is not None
    assert built(config_for(corpus), is_main=False) is None
    assert built(tiny_config(corpus), is_main=True) is None
