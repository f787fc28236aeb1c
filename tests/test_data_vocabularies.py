"""The real vocabularies of Llama 3 and Qwen, as tiktoken files and as tokenizer.json.

``tests.support.vocabularies`` fetches them.
"""

from __future__ import annotations

import csv
import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_dist.data.byte_counter import ByteCounter
from jepa_dist.data.inspect_shards import main as inspect
from jepa_dist.data.prepare import main as prepare
from jepa_dist.data.shards import read_shard
from jepa_dist.data.tokenizer import Tokenizer, load_tokenizer

_FOLDER = os.environ.get("TEST_VOCABULARIES", "")
pytestmark = pytest.mark.skipif(
    not _FOLDER, reason="needs TEST_VOCABULARIES (python -m tests.support.vocabularies FOLDER)"
)
pytest.importorskip("tiktoken")
convert = pytest.importorskip("transformers.convert_slow_tokenizer")

TEXT = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (csv, textwrap))


class Family(NamedTuple):
    file: str
    words: str
    """The published pattern that cuts text into words."""
    bos: str
    bos_id: int
    vocab_size: int
    known: dict[str, list[int]]
    """Ids of texts, as the models' own tokenizers give them."""


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = {
    "llama3": Family(
        "llama3.model",
        _WORDS.replace("DIGITS", r"\p{N}{1,3}"),
        "<|begin_of_text|>",
        128_000,
        128_256,
        {"Hello world!": [9906, 1917, 0], " 12345": [220, 4513, 1774]},
    ),
    "qwen": Family(
        "qwen.tiktoken",
        _WORDS.replace("DIGITS", r"\p{N}"),
        "<|endoftext|>",
        151_643,
        151_936,
        {"Hello world!": [9707, 1879, 0], " 12345": [220, 16, 17, 18, 19, 20]},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family: Family) -> Tokenizer:
    return load_tokenizer(f"{_FOLDER}/{family.file}")


@pytest.fixture(scope="module")
def counter(tokenizer: Tokenizer) -> ByteCounter:
    return tokenizer.byte_counter()


def counted(counter: ByteCounter, tokenizer: Tokenizer, text: bytes) -> int:
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id])
    return int(counter.count(ids[:-1], ids[1:]).sum())


def test_ids_are_those_of_the_models(family: Family, tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (family.bos_id, family.vocab_size)
    for text, ids in family.known.items():
        assert tokenizer.encode(text.encode()).tolist() == ids


@settings(max_examples=300, deadline=None)
@given(text=st.binary() | st.text().map(str.encode))
def test_every_byte_is_counted_once_and_decoded(
    tokenizer: Tokenizer, counter: ByteCounter, text: bytes
) -> None:
    ids = tokenizer.encode(text)
    assert counted(counter, tokenizer, text) == len(text)
    assert tokenizer.decode(ids.tolist()) == text.decode("utf-8", "replace")


@pytest.mark.slow
def test_a_tokenizer_json_gives_the_same_ids(
    family: Family, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As converted by the transformers library; Qwen's has a piece "<s>", which is text."""
    converter = convert.TikTokenConverter(
        vocab_file=f"{_FOLDER}/{family.file}",
        pattern=family.words,
        extra_special_tokens=[family.bos],
    )
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    other = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert other.bos_id == family.bos_id
    for text in (
        TEXT,
        "<s>\u00e9e\u0301 \ud55c\u1112\u1161\u11ab \U0001f30a 12345\n\n\t<|im_end|>",
    ):
        assert other.encode(text.encode()).tolist() == tokenizer.encode(text.encode()).tolist()
    assert counted(other.byte_counter(), other, TEXT.encode()) == len(TEXT.encode())


def test_shards_hold_every_id_and_count_the_bytes(
    family: Family, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"train": TEXT, "val": "\U0001f30a <s> \ud55c"}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / "train.txt"), "--val", str(tmp_path / "val.txt"), "--workers", "1"]
    out = tmp_path / "out"
    assert prepare([*files, "--tokenizer", f"{_FOLDER}/{family.file}", "--out", str(out)]) == 0
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta["counted_bytes"] == meta["text_bytes"]
    (shard,) = out.glob("val_*.bin")
    tokens = np.array(read_shard(shard))
    assert tokens.dtype == np.uint32
    assert tokens[0] == family.bos_id
    assert tokens.max() == family.bos_id > 65_535
    assert tokenizer.decode(tokens.tolist()) == texts["val"]
    capsys.readouterr()
    inspect([str(shard), "--tokenizer", f"{_FOLDER}/{family.file}"])
    assert texts["val"] in capsys.readouterr().out
