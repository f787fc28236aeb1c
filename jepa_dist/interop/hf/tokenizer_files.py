"""The tokenizer's files in an exported folder, loadable by ``AutoTokenizer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jepa_dist.data.tokenizer import BYTES, Tokenizer
from jepa_dist.errors import UserError
from jepa_dist.files import read_bytes

BOS = "<|bos|>"

_MOST_BYTES = 1 << 28
_CODE = Path(__file__).parent / "tokenization_jepa_gpt.py"


def tokenizer_files(spec: str, tokenizer: Tokenizer, seq_len: int) -> dict[str, bytes]:
    """Return the contents of the files by name.

    Args:
        spec: ``bytes``, or the path of a SentencePiece model or of a ``tokenizer.json``.
        tokenizer: The loaded tokenizer.
        seq_len: Longest row of the model.

    Raises:
        UserError: the tokenizer's file cannot be read, or is of another kind.
    """
    settings: dict[str, Any] = {
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if spec == BYTES:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"bos_token": BOS, "eos_token": BOS, "pad_token": BOS}
        files = {"tokenizer.json": _json(_byte_tokenizer(tokenizer.bos_id))}
    elif Path(spec).suffix == ".json":
        content, bos = _with_bos(Path(spec), tokenizer.bos_id)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"bos_token": bos, "eos_token": bos, "pad_token": bos}
        files = {"tokenizer.json": content}
    elif not tokenizer.name.startswith("sentencepiece "):
        raise UserError(
            f"data.tokenizer={spec}: cannot be exported for transformers; expected 'bytes', a "
            "SentencePiece model or a tokenizer.json"
        )
    else:
        settings |= {
            "tokenizer_class": "JepaGPTTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_jepa_gpt.JepaGPTTokenizer", None]},
        }
        files = {"tokenizer.model": _read(Path(spec)), _CODE.name: _read(_CODE)}
    return {**files, "tokenizer_config.json": _json(settings)}


def _byte_tokenizer(bos_id: int) -> dict[str, Any]:
    """Return a tokenizer of bytes with a leading BOS, as a BPE without merges."""
    bos = {
        "id": bos_id,
        "content": BOS,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [bos],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": _bos_first(BOS, bos_id),
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_character(byte): byte for byte in range(256)} | {BOS: bos_id},
            "merges": [],
        },
    }


def _with_bos(path: Path, bos_id: int) -> tuple[bytes, str]:
    """Return a ``tokenizer.json`` that prepends the token of this id, and that token."""
    try:
        tokenizer = json.loads(_read(path))
        names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
        names |= {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
        bos = str(names[bos_id])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no tokenizer.json with a token of id {bos_id}") from None
    return _json(tokenizer | {"post_processor": _bos_first(bos, bos_id)}), bos


def _bos_first(name: str, index: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    text, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }


def _character(byte: int) -> str:
    """Return the character of a byte in a byte-level vocabulary (GPT-2's table): itself if it is
    printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
