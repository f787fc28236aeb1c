"""Tokenizers, and how many bytes of text each token stands for.

``bytes`` needs nothing: ids 0-255 are the bytes, 256 begins a document. Anything else is the
path of a SentencePiece model (extra ``[sentencepiece]``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jepa_dist.data.shards import Tokens
from jepa_dist.errors import UserError
from jepa_dist.files import check_regular

BYTES = "bytes"
_SPACE = "\u2581"  # how SentencePiece writes a space
_MOST_MODEL_BYTES = 1 << 28


@dataclass(frozen=True)
class ByteCounter:
    """Bytes of text per token, for bits per byte; tables over token ids, each [vocab_size].

    ``base_bytes`` (int16) counts UTF-8 bytes without a leading space, ``has_leading_space``
    (bool) adds one unless the previous token ``is_boundary`` (bool: control tokens, which stand
    for no text): there SentencePiece has put the space in itself. Two kinds of models need more:

    * ``has_trailing_space`` (bool; a space ends a word, and SentencePiece adds one at the end of
      a text): that space counts with the token after it, unless that is a boundary.
    * ``spelled_space`` (three ids; a space without a piece of its own is spelled in the three
      bytes of U+2581): the three count as one byte, or as none where SentencePiece put it in.
    """

    base_bytes: npt.NDArray[np.int16]
    has_leading_space: npt.NDArray[np.bool_]
    is_boundary: npt.NDArray[np.bool_]
    has_trailing_space: npt.NDArray[np.bool_] | None = None
    spelled_space: tuple[int, int, int] | None = None

    def count(self, prev: npt.NDArray[Any], target: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Bytes of each target given the token before it; integer ids of one shape, int64 out.

        The last axis is a sequence: ``prev`` is ``target`` one place earlier. Only sums over
        sequences are exact; a single token may count the byte of its neighbor.
        """
        space = self.has_leading_space[target] & ~self.is_boundary[prev]
        counted: npt.NDArray[np.int64] = self.base_bytes[target].astype(np.int64) + space
        if self.has_trailing_space is not None:
            counted += self.has_trailing_space[prev] & ~self.is_boundary[target]
        if self.spelled_space is not None:
            first, second, third = self.spelled_space
            ends_a_space = (prev == second) & (target == third)
            ends_a_space[..., 1:] &= prev[..., :-1] == first
            counted -= 2 * ends_a_space
            counted -= (target == first) & self.is_boundary[prev]
        return counted


class Tokenizer(Protocol):
    """What prepares text for the shards and counts the bytes behind tokens."""

    name: str
    """Identity that travels with prepared data: the same name means the same ids."""
    vocab_size: int
    bos_id: int
    note: str | None
    """What of a text the ids do not hold, in words, if anything is lost."""

    def encode(self, text: bytes) -> Tokens:
        """Ids of a piece of UTF-8 text, uint16 [tokens], without BOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; boundary tokens vanish, broken UTF-8 becomes U+FFFD."""

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        """Tables for ``vocab_size`` ids (default: the tokenizer's); unused ids are boundaries."""


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer a specification stands for.

    Args:
        spec: ``"bytes"`` or the path of a SentencePiece model.

    Raises:
        UserError: no such model, not a SentencePiece model, one without BOS or with more than
            65536 pieces, or the sentencepiece package is missing.

    A model that does not keep every byte of a text is loaded, with a ``note``.
    """
    return _Bytes() if spec == BYTES else _SentencePiece(Path(spec))


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
        if self.vocab_size > 2**16:
            raise UserError(
                f"{path}: has {self.vocab_size} pieces; token shards hold uint16 ids, "
                "so use a model of at most 65536"
            )
        self.note = _note(self, str(path))

    def encode(self, text: bytes) -> Tokens:
        return np.array(self._pieces.encode(text.decode("utf-8", "replace")), dtype=np.uint16)

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
        """Where SentencePiece adds a space to every text: "prefix", "suffix" or nowhere."""
        text = "".join(self._pieces.encode("a", out_type=str))
        if text.startswith(_SPACE) or text.startswith("".join(map(_byte_piece, _SPACE.encode()))):
            return "prefix"
        return "suffix" if text.endswith(_SPACE) else None

    def _spelled_space(self) -> tuple[int, int, int] | None:
        """Ids of the three bytes of U+2581 where the model has no piece for it."""
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
    """Compare the bytes of a text with those that its tokens are counted as.

    No SentencePiece model keeps invalid UTF-8 (each such byte becomes U+FFFD), so that alone is
    not worth a note.
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
    ".json": "a Hugging Face tokenizer",
    ".tiktoken": "a tiktoken vocabulary",
    ".pkl": "a pickle, which is never loaded",
    ".txt": "a list of words or merges",
}


def _load_sentencepiece(path: Path) -> Any:
    told, expected = (
        f"tokenizer {str(path)!r}",
        "expected 'bytes' or the path of a SentencePiece .model",
    )
    try:
        check_regular(path, _MOST_MODEL_BYTES)
    except FileNotFoundError:
        raise UserError(f"{told}: no such file; {expected}") from None
    except IsADirectoryError:
        raise UserError(f"{told}: is a folder; name the .model file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{told}: {reason}; {expected}") from None
    if path.suffix in _OTHER_TOKENIZERS:
        raise UserError(
            f"{told}: is {_OTHER_TOKENIZERS[path.suffix]}; {expected} (shards that were made with "
            "another tokenizer are trained on with data.tokenizer=null)"
        )
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{told}: needs the sentencepiece package; pip install 'jepa_dist[sentencepiece]'"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{told}: not a SentencePiece model; {expected}") from None
