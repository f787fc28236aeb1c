from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from jepa_dist.data.baseline import ngram_baseline
from jepa_dist.data.shards import write_shard
from jepa_dist.data.tokenizer import BYTES, ByteCounter, load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.validation import Validation
from jepa_dist.training import baselines
from jepa_dist.training.baselines import Baselines
from tests.support.tiny import tiny_config


def test_equals_a_count_with_dictionaries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = [np.minimum(rng.geometric(0.2, size) - 1, 256) for size in (500, 2, 1, 300)]
    paths = [tmp_path / f"{i}.bin" for i in range(len(shards))]
    for path, tokens in zip(paths, shards, strict=True):
        write_shard(path, tokens)
    windows = np.minimum(rng.geometric(0.15, (5, 20)) - 1, 256)
    windows[2, 7] = 256
    expected = by_dictionaries([s.tolist() for s in shards], windows.tolist())
    found = ngram_baseline(paths, windows, 257)
    assert found is not None
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-12)
    assert (found.counted, found.available) == (498 + 298, 803)


def by_dictionaries(shards: list[list[int]], windows: list[list[int]]) -> dict[str, float]:
    grams: Counter[tuple[int, ...]] = Counter()
    contexts: Counter[tuple[int, ...]] = Counter()
    for shard in shards:
        for i in range(2, len(shard)):
            for order in (1, 2, 3):
                gram = tuple(shard[i - order + 1 : i + 1])
                grams[gram] += 1
                contexts[gram[:-1]] += 1

    def probability(gram: tuple[int, ...]) -> float:
        lower = probability(gram[1:]) if len(gram) > 1 else 1 / 257
        return (grams[gram] + lower) / (contexts[gram[:-1]] + 1)

    bits = {2: 0.0, 3: 0.0}
    num_bytes = 0
    for window in windows:
        for i in range(1, len(window)):
            num_bytes += window[i] != 256
            for order in bits:
                bits[order] -= math.log2(probability(tuple(window[max(0, i - order + 1) : i + 1])))
    return {"bigram": bits[2] / num_bytes, "trigram": bits[3] / num_bytes}


def test_probabilities_sum_to_one(tmp_path: Path) -> None:
    """Over all possible last targets of one context, through the public function alone."""
    rng = np.random.default_rng(1)
    path = tmp_path / "a.bin"
    write_shard(path, rng.integers(0, 5, 200))
    counter = ByteCounter(np.ones(8, np.int16), np.zeros(8, bool), np.zeros(8, bool))
    for order in ("bigram", "trigram"):
        total = 0.0
        for last in range(8):
            windows = np.array([[1, 2, last]])
            both = ngram_baseline([path], windows, 8, counter)
            first = ngram_baseline([path], windows[:, :2], 8, counter)
            assert both is not None
            assert first is not None
            total += 2 ** -(2 * both.bits_per_byte[order] - first.bits_per_byte[order])
        assert total == pytest.approx(1.0, abs=1e-9)


def test_a_big_vocabulary_has_no_baseline(tmp_path: Path) -> None:
    assert ngram_baseline([tmp_path / "never read.bin"], np.zeros((1, 3), int), 513) is None


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([1, 2, 300, 4]))
    with pytest.raises(UserError, match=r"a\.bin: holds token id 300"):
        ngram_baseline([tmp_path / "a.bin"], np.zeros((1, 3), int), 257)


def test_training_does_not_wait_for_the_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_count = threading.Event()

    def count(*_: object) -> dict[str, float]:
        assert may_count.wait(60)
        return {"baseline/bigram_bpb": 2.0}

    monkeypatch.setattr(baselines, "compute_baselines", count)
    config, tokenizer = tiny_config(tmp_path), load_tokenizer(BYTES)
    of_run = Baselines(config, cast(Validation, None), tokenizer, print)
    may_count.set()
    assert of_run.values() == {"baseline/bigram_bpb": 2.0}


def test_baselines_that_cannot_be_counted_do_not_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    config = tiny_config(tmp_path, data__train="/nowhere/*.bin", model__vocab_size=257)
    tokenizer = load_tokenizer(BYTES)
    of_run = Baselines(config, cast(Validation, None), tokenizer, said.append)
    assert of_run.values() == {}
    (line,) = said
    assert line.startswith("warning: no n-gram baselines: UserError: data.train='/nowhere/*.bin'")


@pytest.mark.slow
def test_thirty_megabytes_take_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    write_shard(tmp_path / "a.bin", np.minimum(rng.geometric(0.05, 30_000_000), 256))
    started = time.process_time()
    ngram_baseline([tmp_path / "a.bin"], np.zeros((600, 513), int), 257)
    assert time.process_time() - started < 6
