from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from jepa_dist.data import tokenizer_training
from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.record_files import TextOf
from jepa_dist.data.shards import read_shard
from jepa_dist.data.tokenizer import load_tokenizer

pytest.importorskip("tokenizers")

WORDS = ["low", "tide", "runs", "deep", "heron", "two", "three", "héron\n", "12345", "🌊"]


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Documents of words, and others to validate on."""
    rng = random.Random(0)
    for name in ("a.txt", "b.txt", "val.txt"):
        (tmp_path / name).write_text(" ".join(rng.choices(WORDS, k=4000)))
    train = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    return [*train, "--val", str(tmp_path / "val.txt"), "--workers", "1"]


def prepare(corpus: list[str], out: Path, *more: str) -> None:
    assert main([*corpus, "--out", str(out), *more]) == 0


def test_a_vocabulary_is_trained_and_written_beside_the_shards(
    corpus: list[str], tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "out", "--train-tokenizer", "290")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (meta.tokenizer, meta.vocab_size, meta.bos_id) == (tokenizer.name, 290, 0)
    assert meta.text_bytes == meta.counted_bytes
    assert meta.tokens["train"] < meta.text_bytes["train"] / 2
    val = read_shard(tmp_path / "out" / "val_000000.bin")
    assert tokenizer.decode(val.tolist()) == (tmp_path / "val.txt").read_text()


def test_the_same_input_gives_the_same_vocabulary(corpus: list[str], tmp_path: Path) -> None:
    for out in ("one", "two"):
        prepare(corpus, tmp_path / out, "--train-tokenizer", "290")
    found = [(tmp_path / out / "tokenizer.json").read_bytes() for out in ("one", "two")]
    assert found[0] == found[1]
    prepare(corpus, tmp_path / "one", "--train-tokenizer", "290")  # is done already


def test_validation_text_is_left_out(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("zzzzzzzz" * 4000)
    prepare(corpus, tmp_path / "out", "--train-tokenizer", "290")
    assert '"zz"' not in (tmp_path / "out" / "tokenizer.json").read_text()


def test_large_input_is_sampled(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jepa_dist.data import documents

    monkeypatch.setattr(documents, "TASK_BYTES", 1 << 16)
    monkeypatch.setattr(documents, "_CUT_WINDOW", 1 << 10)
    rng = np.random.default_rng(0)
    path = tmp_path / "big.txt"
    path.write_bytes(rng.integers(97, 123, 4 << 20, dtype=np.uint8).tobytes())
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 1 << 20)
    file = documents.InputFile(path, path.name, path.stat().st_size, "train")
    sample = list(tokenizer_training._sample([file], None, TextOf(), 0.5))
    size = sum(map(len, sample))
    assert 0.5 < size / (1 << 20) < 1.6
    assert sample == list(tokenizer_training._sample([file], None, TextOf(), 0.5))


@pytest.mark.parametrize("value", ["256", "many", "9999999"])
def test_an_invalid_vocabulary_size_is_refused(
    corpus: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*corpus, "--out", "out", "--train-tokenizer", value]) == 2
    assert "expected a whole number from 257 to 1048576" in capsys.readouterr().err
