"""Byte-level BPE: the vocabularies of GPT-2, Llama 3, Qwen and others, from their files.

Every token is a known byte string, and every byte has a token. So any text is preserved exactly,
unless the tokenizer's own normalizer changes it.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jepa_dist.data.byte_counter import ByteCounter
from jepa_dist.data.shard_format import token_dtype
from jepa_dist.errors import UserError
from jepa_dist.files import read_bytes, read_json

_MOST_BYTES = 1 << 28
_MOST_IDS = 2**24

# Tokens that begin documents, by custom.
_BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<bos>", "<s>", "<|endoftext|>")


class ByteLevel:
    """A tokenizer whose tokens are byte strings (``data.tokenizer.Tokenizer``).

    Args:
        name: Identity of the tokenizer.
        tokens: Bytes of each id; None for ids without text (special tokens, gaps).
        bos_id: Id that begins every document.
        encode: Returns the ids of valid Unicode text; can be pickled.

    Raises:
        UserError: some byte has no token.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[bytes | None],
        bos_id: int,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self.name = name
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.note: str | None = None
        self._tokens = tokens
        self._encode = encode
        self._dtype = token_dtype(self.vocab_size)
        singles = {token[0]: i for i, token in enumerate(tokens) if token and len(token) == 1}
        if len(singles) < 256:
            missing = next(byte for byte in range(256) if byte not in singles)
            raise UserError(
                f"{name}: has no token for byte 0x{missing:02x}, so it cannot encode every text; "
                "use a byte-level vocabulary with all 256 bytes"
            )
        self._byte_ids = np.array([singles[byte] for byte in range(256)], dtype=self._dtype)

    def encode(self, text: bytes) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return the ids of a text, [tokens], without BOS; invalid UTF-8 is preserved."""
        try:
            return np.array(self._encode(text.decode()), dtype=self._dtype)
        except UnicodeDecodeError:
            return np.concatenate([np.empty(0, self._dtype), *self._encode_parts(text)])

    def _encode_parts(self, text: bytes) -> Iterator[npt.NDArray[Any]]:
        """Yield the ids of text with invalid UTF-8; each invalid byte becomes a token."""
        start = 0
        while start < len(text):
            try:
                valid, bad = text[start:].decode(), 0
                end = len(text)
            except UnicodeDecodeError as error:
                end, bad = start + error.start, error.end - error.start
                valid = text[start:end].decode()
            if valid:
                yield np.array(self._encode(valid), dtype=self._dtype)
            yield self._byte_ids[np.frombuffer(text[end : end + bad], dtype=np.uint8)]
            start = end + bad

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without special tokens; invalid UTF-8 becomes U+FFFD."""
        known = (self._tokens[i] for i in ids if i < self.vocab_size)
        return b"".join(token for token in known if token).decode("utf-8", "replace")

    def byte_counter(self, vocab_size: int | None = None) -> ByteCounter:
        """Return tables for ``vocab_size`` ids (default: all); unused ids are boundaries."""
        size = vocab_size or self.vocab_size
        base_bytes = np.zeros(size, np.int16)
        is_boundary = np.ones(size, np.bool_)
        for i, token in enumerate(self._tokens[:size]):
            if token is not None:
                base_bytes[i], is_boundary[i] = len(token), False
        return ByteCounter(base_bytes, np.zeros(size, np.bool_), is_boundary)


def _table(tokens: Mapping[int, bytes], size: int, label: str) -> list[bytes | None]:
    if not 0 < size <= _MOST_IDS:
        raise UserError(f"{label}: has ids up to {size - 1}; expected at most {_MOST_IDS} ids")
    return [tokens.get(i) for i in range(size)]


def _identity(kind: str, content: bytes, bos_id: int) -> str:
    digest = hashlib.blake2b(content + b"\0%d" % bos_id, digest_size=8)
    return f"{kind} {digest.hexdigest()}"


# ---------------------------------------------------------------------------- tokenizer.json


def load_hugging_face(path: Path) -> ByteLevel:
    """Load the byte-level BPE of a ``tokenizer.json``.

    A document begins with the ``bos_token`` of the ``tokenizer_config.json`` in the same folder;
    without one, with the first token of the file's post-processor, or a well-known one.

    Raises:
        UserError: not such a file, not byte-level BPE, without a token that begins documents, or
            the tokenizers package is missing.
    """
    label = f"tokenizer {str(path)!r}"
    try:
        content = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
    return hugging_face_from(content, label, _configured_bos(path.parent / "tokenizer_config.json"))


def hugging_face_from(content: bytes, label: str, bos_token: str | None = None) -> ByteLevel:
    """Return the byte-level BPE in the contents of a ``tokenizer.json``.

    Args:
        content: Contents of the file.
        label: Name of the tokenizer in errors.
        bos_token: The token that begins documents, if that is known.

    Raises:
        UserError: as ``load_hugging_face``.
    """
    encode = _HuggingFaceEncode(content, label)
    model = encode.model
    _check_byte_level(json.loads(content), label)
    ids = model.get_vocab(with_added_tokens=True)
    table = _table(_token_bytes(model), max(ids.values(), default=-1) + 1, label)
    bos_id = _bos_id(model, bos_token, label)
    return ByteLevel(_identity("tokenizer.json", content, bos_id), table, bos_id, encode)


class _HuggingFaceEncode:
    """Encoder of a ``tokenizer.json``, pickled as its contents; other processes load it again."""

    def __init__(self, content: bytes, label: str) -> None:
        self._content, self._label = content, label
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{label}: needs the tokenizers package; pip install 'jepa_dist[hf]'"
            ) from None
        try:
            self.model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise UserError(
                f"{label}: not a tokenizer.json of Hugging Face: {str(error)[:200]}; name the file "
                "in the folder of the model's weights"
            ) from None
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # text that spells a special token is text

    def __call__(self, text: str) -> Sequence[int]:
        try:
            return list(self.model.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the library; it exports no class
                raise
            raise UserError(
                f"{self._label}: cannot encode a text of {len(text)} characters: "
                f"{str(error)[:200]}; use another tokenizer, or a simpler pre_tokenizer"
            ) from None

    def __reduce__(self) -> Any:
        return _HuggingFaceEncode, (self._content, self._label)


def _check_byte_level(data: Any, label: str) -> None:
    """Raise if the tokens of a ``tokenizer.json`` are not byte strings, or if it adds text."""
    pre_tokenizers, decoders = _parts(data.get("pre_tokenizer")), _parts(data.get("decoder"))
    types = {part.get("type") for part in (*pre_tokenizers, *decoders)}
    if data.get("model", {}).get("type") != "BPE" or "ByteLevel" not in types:
        raise UserError(
            f"{label}: not byte-level BPE, so its bytes per token are not known exactly; use the "
            "model's SentencePiece file (tokenizer.model) if it has one"
        )
    if any(part.get("add_prefix_space") for part in pre_tokenizers):
        raise UserError(
            f"{label}: adds a space to the start of every text (add_prefix_space in "
            "pre_tokenizer); set it to false in the file"
        )


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return a component of a ``tokenizer.json`` as a list, or those of a sequence."""
    if not isinstance(component, dict):
        return []
    inner = component.get("pretokenizers") or component.get("decoders") or []
    return [component, *(part for item in inner for part in _parts(item))]


def _token_bytes(model: Any) -> dict[int, bytes]:
    """Return the bytes of each id that has text."""
    byte_of = {letter: byte for byte, letter in _letters().items()}
    tokens = {}
    for token, i in model.get_vocab(with_added_tokens=False).items():
        if all(letter in byte_of for letter in token):
            tokens[i] = bytes(byte_of[letter] for letter in token)
    for i, added in model.get_added_tokens_decoder().items():
        tokens.pop(i, None)
        if not added.special:
            tokens[i] = added.content.encode()
    return tokens


@functools.cache
def _letters() -> dict[int, str]:
    """Return the character that byte-level BPE writes for each byte (GPT-2's table).

    Printable Latin-1 characters map to themselves, the other bytes in order to U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def _configured_bos(config: Path) -> str | None:
    """Return the ``bos_token`` of a ``tokenizer_config.json``; None if there is none."""
    try:
        token = read_json(config, _MOST_BYTES).get("bos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _bos_id(model: Any, configured: str | None, label: str) -> int:
    added = model.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    if configured is not None and model.token_to_id(configured) is not None:
        if configured not in special:
            raise UserError(
                f"{label}: bos_token={configured!r} of tokenizer_config.json is a token of text, "
                "so that a text could end a document; name one of the special tokens: "
                + (", ".join(map(repr, list(special)[:8])) or "there are none")
            )
        return special[configured]
    by_processor = list(model.encode("", add_special_tokens=True).ids)[:1]
    # A vocabulary may have such a name as an ordinary token: Qwen's has "<s>".
    by_name = [special[name] for name in _BOS_NAMES if name in special]
    found = [*by_processor, *by_name]
    if not found:
        raise UserError(
            f"{label}: nothing says which token begins a document; add a tokenizer_config.json "
            'to its folder, with {"bos_token": "TOKEN"}'
        )
    return int(found[0])


# ---------------------------------------------------------------------------- tiktoken

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# As in current tiktoken: unlike Llama 3's, white space at the end of a text is one piece.
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]|\s+(?!\S)|\s"
)

# What tiktoken files lack, for vocabularies recognized by their number of tokens: the pattern that
# splits text, the id that begins documents, the number of ids including special ones.
_KNOWN = {
    50_256: (_GPT2, 50_256, 50_257),  # gpt2, r50k_base
    100_256: (_CL100K, 100_257, 100_277),  # cl100k_base
    128_000: (_LLAMA3, 128_000, 128_256),  # Llama 3
    151_643: (_LLAMA3.replace("{1,3}", ""), 151_643, 151_936),  # Qwen
}


def load_tiktoken(path: Path) -> ByteLevel:
    """Load a tiktoken file, which has a line per token: its bytes in base64, and its rank.

    It lacks the pattern that splits text into words, and the special tokens. Both are known for
    GPT-2, cl100k_base, Llama 3 and Qwen; for others ``PATH.json`` must give them:
    ``{"pattern": REGEX, "special_tokens": {NAME: ID}, "bos_token": NAME}``.

    Raises:
        UserError: not such a file, an unknown vocabulary, or the tiktoken package is missing.
    """
    label = f"tokenizer {str(path)!r}"
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            f"{label}: needs the tiktoken package; pip install 'jepa_dist[tiktoken]'"
        ) from None
    try:
        content = read_bytes(path, _MOST_BYTES)
        pairs = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{label}: not a tiktoken vocabulary: {error}") from None
    pattern, bos_id, size = _completed(path, ranks, label)
    tokens = {i: token for token, i in ranks.items()}
    table = _table(tokens, max(size, bos_id + 1, *(i + 1 for i in tokens)), label)
    try:
        encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{label}: {str(error)[:200]}; correct {path.name}.json") from None
    name = _identity("tiktoken", content + pattern.encode(), bos_id)
    return ByteLevel(name, table, bos_id, encoding.encode_ordinary)


def _completed(path: Path, ranks: Mapping[bytes, int], label: str) -> tuple[str, int, int]:
    """Return pattern, id that begins documents and number of ids of a tiktoken vocabulary."""
    beside = path.with_name(path.name + ".json")
    try:
        given = read_json(beside, _MOST_BYTES)
        special = {str(name): int(i) for name, i in given["special_tokens"].items()}
        bos_id = special[given["bos_token"]]
        if bos_id in ranks.values():
            raise ValueError(f"id {bos_id} of the bos_token is the id of a text token")
        return str(given["pattern"]), bos_id, max(special.values()) + 1
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{beside}: not as expected ({error!s:.200}); expected "
            '{"pattern": REGEX, "special_tokens": {NAME: ID}, "bos_token": NAME}'
        ) from None
    if len(ranks) not in _KNOWN:
        raise UserError(
            f"{label}: has {len(ranks)} tokens, unlike known vocabularies; add {beside.name} with "
            'what the file lacks: {"pattern": REGEX, "special_tokens": {NAME: ID}, '
            '"bos_token": NAME}'
        )
    return _KNOWN[len(ranks)]
