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

BYTES = "bytes"
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class ByteCounter:
    """Bytes per token, for bits per byte; three tables over token ids, each [vocab_size].

    ``base_bytes`` (int16) counts UTF-8 bytes without a leading space, ``has_leading_space``
    (bool) adds one unless the previous token ``is_boundary`` (bool: control tokens, which stand
    for no text).
    """

    base_bytes: npt.NDArray[np.int16]
    has_leading_space: npt.NDArray[np.bool_]
    is_boundary: npt.NDArray[np.bool_]

    def count(self, prev: npt.NDArray[Any], target: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Bytes of each target given the token before it; integer ids of one shape, int64 out."""
        space = self.has_leading_space[target] & ~self.is_boundary[prev]
        return self.base_bytes[target].astype(np.int64) + space


class Tokenizer(Protocol):
    """What prepares text for the shards and counts the bytes behind tokens."""

    name: str
    """Identity that travels with prepared data: the same name means the same ids."""
    vocab_size: int
    bos_id: int

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
    """
    return _Bytes() if spec == BYTES else _SentencePiece(Path(spec))


class _Bytes:
    name = BYTES
    vocab_size = 257
    bos_id = 256

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

    def encode(self, text: bytes) -> Tokens:
        return np.array(self._pieces.encode(text.decode("utf-8", "replace")), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._pieces.decode([int(i) for i in ids]))

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        size = vocab_size or self.vocab_size
        counter = ByteCounter(
            np.zeros(size, np.int16), np.zeros(size, np.bool_), np.ones(size, np.bool_)
        )
        pieces = self._pieces
        for i in range(self.vocab_size):
            if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i):
                continue
            counter.is_boundary[i] = False
            if pieces.is_byte(i):
                counter.base_bytes[i] = 1
                continue
            piece = pieces.id_to_piece(i)
            counter.has_leading_space[i] = piece.startswith(_SPACE)
            counter.base_bytes[i] = len(piece.removeprefix(_SPACE).encode())
        return counter


def _load_sentencepiece(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"tokenizer {str(path)!r}: no such file; expected 'bytes' or the path of a "
            "SentencePiece .model"
        )
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"tokenizer {str(path)!r}: needs the sentencepiece package; "
            "pip install 'jepa_dist[sentencepiece]'"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(
            f"tokenizer {str(path)!r}: not a SentencePiece model; expected 'bytes' or the path of "
            "a SentencePiece .model"
        ) from None
