from __future__ import annotations

import base64
import builtins
import json
import pickle
import signal
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.tokenizer import Tokenizer, load_tokenizer
from jepa_dist.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

BOS = "<|endoftext|>"
TEXT = [
    "the low tide runs deep",
    "a heron, two herons: h\u00e9ron!",
    "  if x:\n    y = 12345\n",
] * 9
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def trained(**parts: Any) -> Any:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    trained().save(str(path))
    return path


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiktoken file: single bytes in an unusual order, then merges of two tokens."""
    path = tmp_path_factory.mktemp("tiktoken") / "small.tiktoken"
    tokens = [bytes([byte]) for byte in reversed(range(256))]
    tokens += [b"th", b"the", b" l", b" lo", b" low", b"\xc3\xa9", b"er", b"on"]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    beside = {"pattern": PATTERN, "special_tokens": {BOS: 264, "<|pad|>": 270}, "bos_token": BOS}
    path.with_name("small.tiktoken.json").write_text(json.dumps(beside))
    return path


@pytest.fixture(scope="module", params=["hugging_face", "tiktoken_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(str(request.getfixturevalue(request.param)))


def counted(tokenizer: Tokenizer, text: bytes) -> int:
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id])
    return int(tokenizer.byte_counter().count(ids[:-1], ids[1:]).sum())


@settings(max_examples=200, deadline=None)
@given(text=st.binary() | st.text().map(str.encode) | st.sampled_from([t.encode() for t in TEXT]))
def test_every_byte_is_counted_once_and_decoded(tokenizer: Tokenizer, text: bytes) -> None:
    ids = tokenizer.encode(text)
    assert counted(tokenizer, text) == len(text)
    assert ids.dtype == np.uint16
    assert not len(ids) or ids.max() < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.bos_id, *ids.tolist()]) == text.decode("utf-8", "replace")


def test_ids_are_those_of_the_library(hugging_face: Path, tiktoken_file: Path) -> None:
    text = "the low tide runs deep: h\u00e9ron 12\n\n  the"
    library = tokenizers.Tokenizer.from_file(str(hugging_face))
    assert load_tokenizer(str(hugging_face)).encode(text.encode()).tolist() == (
        library.encode(text).ids
    )
    small = load_tokenizer(str(tiktoken_file))
    assert small.encode(b"the low").tolist() == [257, 260]
    assert (small.bos_id, small.vocab_size) == (264, 271)


def test_lossless_tokenizers_have_no_note(tokenizer: Tokenizer) -> None:
    assert tokenizer.note is None


def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{BOS}b".encode())
    assert tokenizer.bos_id not in ids
    assert counted(tokenizer, f"a{BOS}b".encode()) == 2 + len(BOS)


def test_another_process_encodes_identically(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (
        copy.encode(b"the low\xff tide").tolist() == tokenizer.encode(b"the low\xff tide").tolist()
    )
    assert copy.name == tokenizer.name


def test_the_identity_is_a_digest_of_the_content(hugging_face: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.json"
    copy.write_bytes(hugging_face.read_bytes())
    assert load_tokenizer(str(copy)).name == load_tokenizer(str(hugging_face)).name
    model = trained()
    model.add_tokens(["herons"])
    model.save(str(copy))
    other = load_tokenizer(str(copy))
    assert other.name != load_tokenizer(str(hugging_face)).name
    assert counted(other, b"two herons run") == 14


def test_bos_comes_from_tokenizer_config(tmp_path: Path) -> None:
    model = trained()
    model.add_special_tokens(["<start>"])
    model.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<start>"}}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.bos_id == model.token_to_id("<start>")
    config.unlink()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).bos_id == model.token_to_id(BOS)


def test_a_text_token_is_refused_as_bos(tmp_path: Path) -> None:
    """Real vocabularies have such tokens: "<s>" is a piece of Qwen's."""
    model = trained()
    model.add_tokens(["<s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.bos_id == model.token_to_id(BOS)
    assert counted(tokenizer, b"the <s>") == 7
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(UserError, match=rf"'<s>' .* is a token of text.*special tokens: '{BOS}'"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_normalizer_that_changes_text_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained(normalizer=tokenizers.normalizers.NFC()).save(str(path))
    note = load_tokenizer(str(path)).note
    assert note is not None
    assert "accents 13 of 14" in note
    assert "normalized text" in note


# ---------------------------------------------------------------------------- Llama 3 and Qwen


def like(digits: str, **parts: Any) -> Any:
    """Return a small vocabulary with the pattern of Llama 3 and Qwen, which differs in digits."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    together = tokenizers.pre_tokenizers.Sequence([split, letters])
    return trained(pre_tokenizer=together, **parts)


def like_llama3() -> Any:
    """No normalizer; a template puts the first token before each text."""
    model = like(r"\p{N}{1,3}")
    model.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"])
    begin = [("<|begin_of_text|>", model.token_to_id("<|begin_of_text|>"))]
    of_bytes = tokenizers.processors.ByteLevel(trim_offsets=True)
    template = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=begin
    )
    model.post_processor = tokenizers.processors.Sequence([of_bytes, template])
    return model


def like_qwen() -> Any:
    """NFC; special tokens, and added ones that are text (of tools and code)."""
    model = like(r"\p{N}", normalizer=tokenizers.normalizers.NFC())
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    of_text = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]
    model.add_tokens([tokenizers.AddedToken(t, normalized=False, special=False) for t in of_text])
    return model


FAMILIES = {"llama3": (like_llama3, "<|begin_of_text|>"), "qwen": (like_qwen, BOS)}
# Accents apart and composed, Hangul in parts and as one, the Angstrom sign, an order of two marks.
PARTS = [
    *("the low tide", " 12345", "\n\n  ", "'LL", "\u00e9", "e\u0301", "\u1112\u1161\u11ab"),
    *("\ud55c", "\u212b", "q\u0323\u0307", "q\u0307\u0323", "\U0001f30a\u200d", "\u3000"),
    *("<|im_end|>", "<tool_call>", "<|fim_prefix|>", "<|begin_of_text|>", "<|eot_id|>", BOS),
]
mixed_text = st.lists(
    st.sampled_from([part.encode() for part in PARTS]) | st.binary(max_size=3), max_size=12
).map(b"".join)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A name of ``FAMILIES``, and its tokenizer."""
    make, bos = FAMILIES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    model = make()
    model.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.bos_id == model.token_to_id(bos)
    return request.param, tokenizer


@settings(max_examples=300, deadline=None)
@given(text=mixed_text)
def test_byte_counts_of_llama3_and_qwen_add_up(family: tuple[str, Tokenizer], text: bytes) -> None:
    """To the text, also if it is not UTF-8; with Qwen, to the NFC-normalized text."""
    name, tokenizer = family
    expected = text
    if name == "qwen":
        characters = text.decode("utf-8", "surrogateescape")
        expected = unicodedata.normalize("NFC", characters).encode("utf-8", "surrogateescape")
    assert counted(tokenizer, text) == len(expected)
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == expected.decode("utf-8", "replace")


@pytest.mark.parametrize("name", FAMILIES)
def test_prepare_reports_what_a_normalizer_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    FAMILIES[name][0]().save(str(tmp_path / "tokenizer.json"))
    texts = {"train": "e\u0301 ".encode() + b"\xff", "val": b"low\xc3"}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_bytes(text)
    command = [str(tmp_path / "train.txt"), "--val", str(tmp_path / "val.txt"), "--workers", "1"]
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*command, *tokenizer, "--out", str(tmp_path / "out")]) == 0
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert meta.text_bytes == {"train": 5, "val": 4}
    changed = name == "qwen"  # three bytes become two
    assert meta.counted_bytes == {"train": 5 - changed, "val": 4}
    assert ("4 of 5 bytes of the text" in capsys.readouterr().out) == changed
    assert (meta.tokenizer_note is not None) == changed


REFUSED = {
    "not JSON": (lambda p: p.write_text("{}"), "not a tokenizer.json of Hugging Face"),
    "not byte-level": (
        lambda p: trained(
            pre_tokenizer=tokenizers.pre_tokenizers.Whitespace(),
            decoder=tokenizers.decoders.BPEDecoder(),
        ).save(str(p)),
        "not byte-level BPE",
    ),
    "adds a space": (
        lambda p: trained(
            pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        ).save(str(p)),
        "add_prefix_space",
    ),
    "no BOS": (
        lambda p: p.write_text(trained().to_str().replace(BOS, "<|other|>")),
        "nothing says which token begins a document",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_whose_bytes_cannot_be_counted_are_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    make(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


def test_an_unknown_tiktoken_vocabulary_asks_for_its_pattern(
    tiktoken_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "alone.tiktoken"
    path.write_bytes(tiktoken_file.read_bytes())
    with pytest.raises(UserError, match=r"has 264 tokens.*add alone\.tiktoken\.json"):
        load_tokenizer(str(path))
    (tmp_path / "alone.tiktoken.json").write_text('{"pattern": "."}')
    with pytest.raises(UserError, match="special_tokens"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(("package", "extra"), [("tokenizers", "hf"), ("tiktoken", "tiktoken")])
def test_a_missing_package_is_named(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    path = request.getfixturevalue("hugging_face" if extra == "hf" else "tiktoken_file")
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=rf"pip install 'jepa_dist\[{extra}\]'"):
        load_tokenizer(str(path))
