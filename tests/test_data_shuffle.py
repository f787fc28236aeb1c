"""Documents in random order: ``prepare --shuffle``."""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jepa_dist.data import documents, shuffle
from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.shuffle import ShuffledDocuments
from tests.support.prepared import documents_of, prepared, write_jsonl

BOS = 256
TEXTS = [f"document {n} " + "word " * (n % 40) for n in range(300)]


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    return path


def shuffled(folder: Path, stream: np.ndarray, buckets: int, step: int, seed: int = 0) -> list[int]:
    """Write the stream ``step`` tokens at a time; return it in its new order."""
    place = folder / f"{buckets}-{step}-{seed}"
    with ShuffledDocuments(place, BOS, seed, buckets, np.dtype("<u2")) as store:
        for start in range(0, len(stream), step):
            store.write(stream[start : start + step])
        tokens = np.concatenate(list(store.read()))
    assert not place.exists()
    return tokens.tolist()


def test_the_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """Not on the number of buckets, nor on where the stream of documents is cut."""
    stream = np.concatenate([[BOS, *text.encode()] for text in TEXTS]).astype(np.uint16)
    expected = shuffled(tmp_path, stream, 1, len(stream))
    for buckets, step in ((7, 1000), (128, 13)):
        assert shuffled(tmp_path, stream, buckets, step) == expected
    assert shuffled(tmp_path, stream, 7, 1000, seed=1) != expected
    assert sorted(expected) == sorted(stream.tolist())


def test_documents_are_spread_as_in_a_random_order(tmp_path: Path) -> None:
    count = 3000
    stream = np.stack([np.full(count, 60_000), np.arange(count)], axis=1).ravel()
    with ShuffledDocuments(tmp_path / "x", 60_000, 5, 9, np.dtype("<u2")) as store:
        store.write(stream)
        order = np.concatenate(list(store.read()))[1::2].astype(int)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert abs(np.abs(order - np.arange(count)).mean() / count - 1 / 3) < 0.02
    assert abs(np.abs(np.diff(order)).mean() / count - 1 / 3) < 0.02


def test_prepare_shuffles_the_training_documents(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--val-fraction", "0.1", "--workers", "1", "--shard-tokens", "3000"]
    for name, more in (("plain", []), ("one", ["--shuffle", "3"]), ("other", ["--shuffle", "4"])):
        assert main([str(text), "--out", str(tmp_path / name), *options, *more]) == 0
    monkeypatch.setattr(documents, "TASK_BYTES", 100)
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 500)
    again = [str(text), "--out", str(tmp_path / "again"), *options, "--shuffle", "3"]
    assert main(again) == 0
    assert prepared(tmp_path / "one") == prepared(tmp_path / "again")
    train = {name: documents_of(tmp_path / name, "train") for name in ("plain", "one", "other")}
    assert train["plain"] != train["one"] != train["other"]
    assert sorted(train["plain"]) == sorted(train["one"]) == sorted(train["other"])
    val = [documents_of(tmp_path / name, "val") for name in ("plain", "one")]
    assert val[0] == val[1]
    meta = read_meta(tmp_path / "one")
    assert meta is not None
    assert meta.shuffle == 3


def test_another_seed_is_another_output(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(text), "--out", str(tmp_path / "out"), "--workers", "1", "--shuffle"]
    assert main([*command, "3"]) == 0
    assert main([*command, "3"]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main([*command, "4"]) == 2
    assert "was prepared with shuffle 3, now 4" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """64 documents of 1 MiB, written in parts."""
    part = np.zeros(1 << 17, dtype=np.uint16)
    with ShuffledDocuments(tmp_path / "x", BOS, 0, 4, np.dtype("<u2")) as store:
        tracemalloc.start()
        for _ in range(64):
            store.write(np.array([BOS], dtype=np.uint16))
            for _ in range(4):
                store.write(part)
        count = sum(map(len, store.read()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 64 * (1 + 4 * len(part))
    assert peak < 8 << 20
