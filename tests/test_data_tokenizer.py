from __future__ import annotations

import builtins
import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.shards import find_shards, read_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from tests.support.golden_cases import GOLDEN_DIR, Case, cases

GOLDEN = cases("bpb")
MODEL = next(iter(sorted(GOLDEN_DIR.glob("*.model"))), None)


@given(st.binary())
def test_bytes_are_their_own_ids(text: bytes) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == text.decode("utf-8", "replace")


def test_bytes_count_as_one_and_bos_as_zero() -> None:
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


# ---------------------------------------------------------------------------- kinds of models

LOSSLESS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "identity": LOSSLESS,
    "whitespace pieces": {**LOSSLESS, "allow_whitespace_only_pieces": True},
    "pieces across words": {**LOSSLESS, "split_by_whitespace": False},
    "no dummy space": {
        **LOSSLESS,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
    },
    "space as suffix": {
        **LOSSLESS,
        "treat_whitespace_as_suffix": True,
        "allow_whitespace_only_pieces": True,
    },
    "suffix, no dummy space": {
        **LOSSLESS,
        "treat_whitespace_as_suffix": True,
        "add_dummy_prefix": False,
    },
    "no piece for a space": LOSSLESS,
    "default": {},
    "default with bytes": {"byte_fallback": True},
}
WORDS = ["low", "tide", "runs", "deep", "x y", "and  it", "   indented", "h\u00e9ron", "\u6c34"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, rng = tmp_path_factory.mktemp("models"), random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]
    found = {}
    for kind, options in KINDS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=out,
            vocab_size=400,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        model = out.getvalue()
        if kind == "no piece for a space":  # call it something else, of as many bytes
            model = model.replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe3\x90\x80")
        found[kind] = folder / f"{kind}.model"
        found[kind].write_bytes(model)
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "default" not in kind])
def test_every_byte_of_a_text_is_counted_once(models: dict[str, Path], kind: str) -> None:
    tokenizer, rng = load_tokenizer(str(models[kind])), random.Random(1)
    assert tokenizer.note is None
    edges = ["", " ", "  ", "\n", "\t\u2014\U0001f30a"]
    documents = [
        (rng.choice(edges) + " ".join(rng.choices(WORDS, k=5)) + rng.choice(edges)).encode()
        for _ in range(200)
    ]
    ids = np.array([i for text in documents for i in (tokenizer.bos_id, *tokenizer.encode(text))])
    counter = tokenizer.byte_counter()
    counted = counter.count(ids, np.append(ids[1:], tokenizer.bos_id))
    assert counted.sum() == sum(map(len, documents))
    rows = np.lib.stride_tricks.sliding_window_view(ids, 33)[::32]  # as windows of evaluation
    by_rows = counter.count(rows[:, :-1], rows[:, 1:]).sum()
    assert by_rows == counted[: rows[:, 1:].size].sum()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "default" in kind])
def test_bytes_that_a_tokenizer_loses_are_reported(models: dict[str, Path], kind: str) -> None:
    note = load_tokenizer(str(models[kind])).note
    assert note is not None
    assert "runs of spaces 18 of 24" in note
    assert ("emoji 0 of 16" in note) == (kind == "default")  # without bytes it is <unk>
    assert "per byte of the normalized text" in note
    assert "\n" not in note


def test_lost_bytes_of_a_corpus_are_counted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a.txt", "low  tide"), ("val.txt", "low tide")):
        (tmp_path / name).write_text(text)
    options = ["--tokenizer", str(models["default with bytes"]), "--out", str(tmp_path / "out")]
    arguments = [str(tmp_path / "a.txt"), "--val", str(tmp_path / "val.txt"), "--workers", "1"]
    assert main([*arguments, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("does not keep a text as it is") == 1
    assert "(8 of 9 bytes of the text are in them)" in captured.out
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (meta.text_bytes, meta.counted_bytes) == ({"train": 9, "val": 8}, {"train": 8, "val": 8})
    assert meta.tokenizer_note is not None
