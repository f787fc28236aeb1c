"""Tokenizers, and the number of bytes of text that each token encodes.

``bytes`` needs nothing: ids 0-255 are the bytes, 256 begins a document. Anything else is the path
of a SentencePiece model (extra ``[sentencepiece]``), of a ``tokenizer.json`` (extra ``[hf]``) or of
a tiktoken vocabulary (extra ``[tiktoken]``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jepa_dist.data.byte_counter import ByteCounter as ByteCounter
from jepa_dist.data.byte_level import ByteLevel, load_hugging_face, load_tiktoken
from jepa_dist.data.shard_format import token_dtype
from jepa_dist.data.shards import Tokens
from jepa_dist.errors import UserError
from jepa_dist.files import open_regular

BYTES = "bytes"
_SPACE = "\u2581"  # SentencePiece's character for a space
_MOST_MODEL_BYTES = 1 << 28


class Tokenizer(Protocol):
    """Encodes text for the shards, and counts the bytes of tokens.

    Ids without text (special tokens) are ``byte_counter().is_boundary``.
    """

    name: str
    """Identity, stored with prepared data: the same name means the same ids."""
    vocab_size: int
    bos_id: int
    note: str | None
    """Description of what encoding loses of a text; None if nothing."""

    def encode(self, text: bytes) -> Tokens:
        """Return the ids of UTF-8 text, [tokens], without BOS; uint16, above 65,536 ids uint32.

        The name of a special token in a text is encoded as ordinary text.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without boundary tokens; invalid UTF-8 becomes U+FFFD."""

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        """Return tables for ``vocab_size`` ids (default: all); unused ids are boundaries."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer of a specification.

    Args:
        spec: ``"bytes"``, or the path of a SentencePiece model, a ``tokenizer.json`` or a tiktoken
            vocabulary.

    Raises:
        UserError: no such file, another format, no token that begins documents, or a missing
            package.

    A model that does not preserve every byte of a text is loaded with a ``note``.
    """
    if spec == BYTES:
        return _Bytes()
    path = Path(spec)
    start = _first_bytes(path)
    if path.suffix == ".json":
        return _noted(load_hugging_face(path), path)
    if _TIKTOKEN_LINE.match(start):
        return _noted(load_tiktoken(path), path)
    return _SentencePiece(path)


def _noted(tokenizer: ByteLevel, path: Path) -> Tokenizer:
    tokenizer.note = _note(tokenizer, str(path))
    return tokenizer


class _Bytes:
    name = BYTES
    vocab_size = 257
    bos_id = 256
    note: str | None = None

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < self.bos_id).decode("utf-8", errors="replace")

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        ids = np.arange(vocab_size or self.vocab_size)
        is_byte = ids < self.bos_id
        return ByteCounter(is_byte.astype(np.int16), np.zeros_like(is_byte), ~is_byte)


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        self._pieces = _load_sentencepiece(path)
        self.name = f"sentencepiece {hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}"
        self.vocab_size = int(self._pieces.get_piece_size())
        self.bos_id = int(self._pieces.bos_id())
        if self.bos_id < 0:
            raise UserError(
                f"{path}: this SentencePiece model has no BOS piece, which begins every document; "
                "train it with bos_id set"
            )
        self._dtype = token_dtype(self.vocab_size)
        self.note = _note(self, str(path))

    def encode(self, text: bytes) -> Tokens:
        return np.array(self._pieces.encode(text.decode("utf-8", "replace")), dtype=self._dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._pieces.decode([int(i) for i in ids]))

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        size = vocab_size or self.vocab_size
        dummy = self._dummy_space()
        base_bytes = np.zeros(size, np.int16)
        leading, trailing = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        is_boundary = np.ones(size, np.bool_)
        pieces = self._pieces
        for i in range(self.vocab_size):
            if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i):
                continue
            is_boundary[i] = False
            if pieces.is_byte(i):
                base_bytes[i] = 1
                continue
            text = pieces.id_to_piece(i).replace(_SPACE, " ")
            leading[i] = dummy == "prefix" and text.startswith(" ")
            trailing[i] = dummy == "suffix" and text.endswith(" ")
            base_bytes[i] = len(text.encode()) - leading[i] - trailing[i]
        return ByteCounter(
            base_bytes,
            leading,
            is_boundary,
            trailing if trailing.any() else None,
            self._spelled_space(),
        )

    def _dummy_space(self) -> str | None:
        """Return where SentencePiece adds a space to every text: "prefix", "suffix" or None."""
        text = "".join(self._pieces.encode("a", out_type=str))
        if text.startswith(_SPACE) or text.startswith("".join(map(_byte_piece, _SPACE.encode()))):
            return "prefix"
        return "suffix" if text.endswith(_SPACE) else None

    def _spelled_space(self) -> tuple[int, int, int] | None:
        """Return the ids of the three bytes of U+2581 if the model has no piece for it."""
        if self._pieces.piece_to_id(_SPACE) != self._pieces.unk_id():
            return None
        first, second, third = (self._pieces.piece_to_id(_byte_piece(b)) for b in _SPACE.encode())
        return None if first == self._pieces.unk_id() else (first, second, third)


def _byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


_PROBE = {
    "a leading space": b" tide",
    "a trailing space": b"tide ",
    "runs of spaces": b"low  tide   runs    deep",
    "tabs": b"low\ttide\t\tdeep",
    "newlines": b"low\ntide\n\n  deep\r\nrun",
    "accents": "h\u00e9ron he\u0301ron".encode(),
    "ligatures and wide letters": "\ufb01n \u2460 \uff34\uff49\uff44\uff45".encode(),
    "CJK": "\u6f6e\u6c34 \u306e \ubb3c".encode(),
    "emoji": "\U0001f30a \U0001f469\u200d\U0001f680".encode(),
}
_INVALID = {"invalid UTF-8": b"low \xff\xfe\x80 tide"}


def _note(tokenizer: Tokenizer, name: str) -> str | None:
    """Compare the bytes of a probe text with the byte counts of its tokens; describe losses.

    No SentencePiece model preserves invalid UTF-8 (each such byte becomes U+FFFD), so this loss
    alone is not described. Byte-level tokenizers preserve it.
    """
    counter = tokenizer.byte_counter()

    def counted(text: bytes) -> int:
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id])
        return int(counter.count(ids[:-1], ids[1:]).sum())

    found = {kind: (counted(text), len(text)) for kind, text in (_PROBE | _INVALID).items()}
    if all(found[kind][0] == found[kind][1] for kind in _PROBE):
        return None
    kept, total = (sum(counts) for counts in zip(*found.values(), strict=True))
    lossy = ", ".join(f"{kind} {n} of {of}" for kind, (n, of) in found.items() if n != of)
    return (
        f"tokenizer {name!r} does not keep a text as it is: {kept} of the {total} bytes of a "
        f"probe text are in its tokens ({lossy}); bits per byte are per byte of the normalized text"
    )


_OTHER_TOKENIZERS = {
    ".pkl": "a pickle, which is never loaded",
    ".txt": "a list of words or merges",
}
_EXPECTED = (
    "expected 'bytes' or the path of a SentencePiece .model, a tokenizer.json or a .tiktoken file"
)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def _first_bytes(path: Path) -> bytes:
    """Return the first bytes of a tokenizer's file.

    Raises:
        UserError: no such file, too large, or of a kind that is never read.
    """
    label = f"tokenizer {str(path)!r}"
    try:
        with open_regular(path, _MOST_MODEL_BYTES) as file:
            start = file.read(256) or b""
    except FileNotFoundError:
        raise UserError(f"{label}: no such file; {_EXPECTED}") from None
    except IsADirectoryError:
        raise UserError(f"{label}: is a folder; name the file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{label}: {reason}; {_EXPECTED}") from None
    if path.suffix in _OTHER_TOKENIZERS:
        raise UserError(
            f"{label}: is {_OTHER_TOKENIZERS[path.suffix]}; {_EXPECTED} (shards that were made "
            "with another tokenizer are trained on with data.tokenizer=null)"
        )
    return start


def _load_sentencepiece(path: Path) -> Any:
    label = f"tokenizer {str(path)!r}"
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{label}: needs the sentencepiece package; pip install 'jepa_dist[sentencepiece]'"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{label}: not a SentencePiece model; {_EXPECTED}") from None
