from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_dist.data.shards import find_shards, read_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from tests.golden_cases import GOLDEN_DIR, Case, cases

GOLDEN = cases("bpb")
MODEL = next(iter(sorted(GOLDEN_DIR.glob("*.model"))), None)


@given(st.binary())
def test_bytes_are_their_own_ids(text: bytes) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == text.decode("utf-8", "replace")


def test_bytes_count_one_each_and_bos_none() -> None:
    counter = load_tokenizer("bytes").byte_counter()
    assert counter.count(np.array([256, 65, 66]), np.array([65, 256, 255])).tolist() == [1, 0, 1]
    assert counter.is_boundary.tolist() == [False] * 256 + [True]
    assert counter.base_bytes.dtype == np.int16
    padded = load_tokenizer("bytes").byte_counter(300)
    assert padded.base_bytes.sum() == 256
    assert padded.is_boundary[256:].all()


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_tables_and_target_bytes(case: Case) -> None:
    arrays, info = case.arrays(), case.info
    tokenizer = load_tokenizer(str(GOLDEN_DIR / info["files"]["tokenizer"]))
    counter = tokenizer.byte_counter(info["settings"]["vocab_size"])
    for name, lut in (
        ("base_bytes_lut", counter.base_bytes),
        ("has_leading_space_lut", counter.has_leading_space),
        ("is_boundary_token_lut", counter.is_boundary),
    ):
        assert lut.dtype == arrays[name].dtype
        assert np.array_equal(lut, arrays[name]), name
    tokens = arrays["val_tokens"]
    assert np.array_equal(counter.count(tokens[:-1], tokens[1:]), arrays["target_bytes"])


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_shards_hold_what_the_tokenizer_makes(case: Case) -> None:
    arrays, info = case.arrays(), case.info
    names = info["files"]["shards_in_order"]
    tokens = np.concatenate([read_shard(GOLDEN_DIR / name) for name in names])
    assert np.array_equal(tokens, arrays["tokens_all"])
    found = [p for p in find_shards(str(GOLDEN_DIR / "*.bin"), "data.val") if p.name in names]
    assert [path.name for path in found] == names
    tokenizer = load_tokenizer(str(GOLDEN_DIR / info["files"]["tokenizer"]))
    text = (GOLDEN_DIR / info["files"]["val_text"]).read_bytes()
    wrapped = [
        token
        for document in text.split(b"\n\x1e\n")
        for token in wrap(document, tokenizer, info["document_wrapping"])
    ]
    assert wrapped == arrays["tokens_all"].tolist()


def wrap(document: bytes, tokenizer: Any, wrapping: str) -> list[int]:
    parts = {"bos": [tokenizer.bos_id], "document": tokenizer.encode(document).tolist()}
    return [token for part in wrapping.split(" + ") for token in parts[part]]


@pytest.mark.parametrize("case", GOLDEN)
def test_sentencepiece_decodes_pickles_and_is_named_by_content(case: Case, tmp_path: Path) -> None:
    model = GOLDEN_DIR / case.info["files"]["tokenizer"]
    tokenizer = load_tokenizer(str(model))
    text = "A plain sentence."
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text
    assert np.array_equal(pickle.loads(pickle.dumps(tokenizer)).encode(text.encode()), ids)
    copy = tmp_path / "other name.model"
    copy.write_bytes(model.read_bytes())
    assert load_tokenizer(str(copy)).name == tokenizer.name != "bytes"


def test_a_missing_or_wrong_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; expected 'bytes' or the path"):
        load_tokenizer("byte")
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "x.model"))


@pytest.mark.skipif(MODEL is None, reason="no tokenizer in the golden directory")
def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'jepa_dist\[sentencepiece\]'"):
        load_tokenizer(str(MODEL))
