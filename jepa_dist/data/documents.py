"""Turn files into token documents: cut them into small byte ranges, then encode task by task.

Cutting is cheap and sequential (in the parent); reading and encoding happen in worker processes.
The result does not depend on the number of processes, and memory is bounded by a task's text,
however large a file is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from jepa_dist.data import compressed
from jepa_dist.data.corpus import SPLITS, InputFile, Split
from jepa_dist.data.record_files import TextOf, json_records, parquet_records
from jepa_dist.data.shard_format import token_dtype
from jepa_dist.data.shards import Tokens
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError

TASK_BYTES = 1 << 20
_CUT_WINDOW = 1 << 16
# A line is held as text and as tokens, about ten times this in total.
LINE_BYTES = 1 << 26

# A document's split is a hash of this many bytes of its start, less than its first piece.
_HEAD_BYTES = 1 << 16
_COUNTED_TOKENS = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Bytes start..stop-1 of a file.

    Of a .jsonl file: complete lines. Otherwise text of the document that begins at byte
    ``document`` of the file.
    """

    file: InputFile
    start: int
    stop: int
    document: int
    head: bytes | None = None
    """Start of the document's text, if it has several pieces."""


@dataclass(frozen=True)
class Block:
    """Complete lines of a compressed .jsonl file."""

    file: InputFile
    lines: compressed.Lines


@dataclass(frozen=True)
class Records:
    """Texts of consecutive records of a file, from record ``first`` (counted from 0)."""

    file: InputFile
    texts: tuple[bytes, ...]
    first: int
    consumed: int
    """Bytes of the file read since the previous records."""


Part = Piece | Block | Records


@dataclass(frozen=True)
class Selected:
    """Parts of which some documents are omitted."""

    parts: list[Part]
    keep: npt.NDArray[np.bool_]
    """Whether to keep each document: first the one that the parts may continue, then each that
    begins in them."""


@dataclass
class Encoded:
    """The result of a task, per split; bytes read."""

    tokens: dict[Split, list[Tokens]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    counted_bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Bytes of text that the tokens encode."""
    bytes_read: int = 0

    def count(self, other: Encoded) -> None:
        """Add the documents and bytes of another task."""
        for split in SPLITS:
            self.documents[split] += other.documents[split]
            self.text_bytes[split] += other.text_bytes[split]
            self.counted_bytes[split] += other.counted_bytes[split]

    def joined(self) -> Encoded:
        """Return the same with one array per split: far cheaper to send than one per document."""
        tokens = {split: [np.concatenate(t)] if t else [] for split, t in self.tokens.items()}
        return replace(self, tokens=tokens)


def split_of(file: InputFile, document: int, text: bytes, val_fraction: float) -> Split:
    """Return the split of a document.

    It only depends on a hash of the document, not on the rest of the corpus, so that adding files
    moves no document to the other split.

    Args:
        file: File that contains the document.
        document: Byte offset of the document, for a file that is split by name.
        text: Its text without byte order mark, or its first ``_HEAD_BYTES`` or more.
        val_fraction: Fraction of validation documents, if the file does not determine the split.
    """
    if file.split:
        return file.split
    if file.split_by == "name":
        identity = f"{file.name}:{document}".encode(errors="surrogateescape")
    else:
        identity = text[:_HEAD_BYTES]
    draw = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")
    return "val" if draw < val_fraction * 2**64 else "train"


# ---------------------------------------------------------------------------- cutting


def tasks(
    files: Iterable[InputFile], separator: bytes | None, text_of: TextOf | None = None
) -> Iterator[list[Part]]:
    """Yield parts of all files in order, in lists of about ``TASK_BYTES``.

    Args:
        files: Files to read.
        separator: Bytes between the documents of a text file; None makes it one document. A line
            end in it also matches CR LF.
        text_of: Extracts the text of a record (default: the field "text").

    Raises:
        UserError: a document of a file of records is longer than ``LINE_BYTES``, or the file is
            damaged.
    """
    task: list[Part] = []
    size = 0
    for file in files:
        for part in _parts(file, separator, text_of or TextOf()):
            task.append(part)
            size += _size(part)
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _size(part: Part) -> int:
    if isinstance(part, Piece):
        return part.stop - part.start
    return len(part.lines.data) if isinstance(part, Block) else sum(map(len, part.texts))


def _consumed(part: Part) -> int:
    """Return the bytes of the file in a part."""
    if isinstance(part, Piece):
        return part.stop - part.start
    return part.lines.consumed if isinstance(part, Block) else part.consumed


def _parts(file: InputFile, separator: bytes | None, text_of: TextOf) -> Iterator[Part]:
    if file.is_compressed:
        for lines in compressed.read_lines(file.path, TASK_BYTES, LINE_BYTES):
            yield Block(file, lines)
    elif file.kind in ("json", "parquet"):
        yield from _records(file, text_of)
    else:
        yield from _pieces(file, separator)


def _records(file: InputFile, text_of: TextOf) -> Iterator[Records]:
    """Yield the texts of a file's records, in groups of about ``TASK_BYTES``."""
    if file.kind == "json":
        records = json_records(file.path, LINE_BYTES)
    else:
        records = parquet_records(file.path, text_of, LINE_BYTES)
    texts: list[bytes] = []
    first = size = reported = read = 0
    for number, (record, read) in enumerate(records):
        try:
            texts.append(text_of(record))
        except ValueError as error:
            raise UserError(f"{file.path}: record {number + 1}: {error}") from None
        size += len(texts[-1])
        if len(texts[-1]) > LINE_BYTES:
            raise UserError(
                f"{file.path}: record {number + 1} has a text of {len(texts[-1]) >> 20} MiB; at "
                f"most {LINE_BYTES >> 20} MiB are one document: split it"
            )
        if size >= TASK_BYTES:
            yield Records(file, tuple(texts), first, read - reported)
            texts, size, reported, first = [], 0, read, number + 1
    if texts:
        yield Records(file, tuple(texts), first, read - reported)


def _pieces(file: InputFile, separator: bytes | None) -> Iterator[Piece]:
    with open(file.path, "rb") as stream:
        if file.kind == "lines":
            yield from _line_ranges(file, stream)
            return
        for start, stop in _documents(file, separator):
            yield from _cut(file, stream, start, stop)


def _line_ranges(file: InputFile, stream: BinaryIO) -> Iterator[Piece]:
    start = 0
    while start < file.size:
        _check_size(file, stream)
        stream.seek(min(start + TASK_BYTES, file.size) - 1)
        rest = stream.readline(LINE_BYTES)
        stop = min(stream.tell(), file.size)
        if stop < file.size and not rest.endswith(b"\n"):
            raise UserError(
                f"{_place(file, stop)}: a line of more than {LINE_BYTES >> 20} MiB; each line is "
                "one document: split it, or give it as a .txt file"
            )
        yield Piece(file, start, stop, start)
        start = stop


def _check_size(file: InputFile, stream: BinaryIO) -> None:
    """Raise if the file has become shorter since it was listed."""
    if os.fstat(stream.fileno()).st_size < file.size:
        raise _shorter(file)


def input_changed() -> UserError:
    """Return the error for input that has changed since it was read before."""
    return UserError("the input changed while it was read; try again")


def _shorter(file: InputFile) -> UserError:
    return UserError(f"{file.path}: became shorter while it was read; try again")


def _documents(file: InputFile, separator: bytes | None) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a text file's documents; may be empty."""
    if separator is None:
        yield 0, file.size
        return
    lines = [re.escape(line) for line in separator.replace(b"\r\n", b"\n").split(b"\n")]
    pattern = re.compile(rb"\r?\n".join(lines))
    longest = len(separator) + separator.count(b"\n")
    start = offset = 0
    text = b""
    with open(file.path, "rb") as stream:
        while block := stream.read(TASK_BYTES):
            text += block
            done = 0
            for found in pattern.finditer(text):
                yield start, offset + found.start()
                done = found.end()
                start = offset + done
            # A separator may span two blocks: keep what may be its start.
            done = max(done, len(text) - longest + 1)
            offset, text = offset + done, text[done:]
    yield start, offset + len(text)


def _cut(file: InputFile, stream: BinaryIO, start: int, stop: int) -> Iterator[Piece]:
    """Yield pieces of a document, cut after a line if one ends nearby, never in a character."""
    document = start
    head = read_head(stream, start, stop) if stop - start > TASK_BYTES else None
    while start < stop:
        end = min(start + TASK_BYTES, stop)
        if end < stop:
            _check_size(file, stream)
            stream.seek(end - _CUT_WINDOW)
            end -= _excess(stream.read(_CUT_WINDOW))
        yield Piece(file, start, end, document, head)
        start = end


def read_head(stream: BinaryIO, start: int, stop: int) -> bytes:
    """Read the start of the document at bytes start..stop-1, for ``split_of``."""
    stream.seek(start)
    data = stream.read(min(len(_BYTE_ORDER_MARK) + _HEAD_BYTES, stop - start))
    return data.removeprefix(_BYTE_ORDER_MARK)


def _excess(text: bytes) -> int:
    """Return how many bytes to remove so that ``text`` ends with a line, or with a character."""
    line_end = text.rfind(b"\n")
    if line_end >= 0:
        return len(text) - line_end - 1
    starts = (n for n in range(1, 5) if text[-n] & 0xC0 != 0x80)
    return next(starts, 0)


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Text:
    """Text of one document; ``begins`` unless it continues one."""

    data: bytes
    split: Split
    begins: bool


def read_texts(part: Part, text_of: TextOf, val_fraction: float) -> Iterator[Text]:
    """Yield the texts of a part, without byte order marks.

    A long document is several texts, cut at the same places in every file format.

    Raises:
        UserError: a bad line of a .jsonl file, with its name and number.
    """
    file = part.file
    if isinstance(part, Piece) and file.kind != "lines":
        begins = part.start == part.document
        data = _bytes_of(part)
        text = data.removeprefix(_BYTE_ORDER_MARK) if begins else data
        head = text if part.head is None else part.head
        yield Text(text, split_of(file, part.document, head, val_fraction), begins)
        return
    documents: Iterable[tuple[int, bytes]]
    if isinstance(part, Records):
        documents = enumerate(part.texts, part.first)
    else:
        documents = _texts_of_lines(part, text_of)
    for document, text in documents:
        head = text[: len(_BYTE_ORDER_MARK) + _HEAD_BYTES].removeprefix(_BYTE_ORDER_MARK)
        split = split_of(file, document, head, val_fraction)
        for begins, data in _cut_text(text):
            yield Text(data.removeprefix(_BYTE_ORDER_MARK) if begins else data, split, begins)


def _bytes_of(piece: Piece) -> bytes:
    with open(piece.file.path, "rb") as stream:
        stream.seek(piece.start)
        data = stream.read(piece.stop - piece.start)
    if len(data) != piece.stop - piece.start:
        raise _shorter(piece.file)
    return data


def _texts_of_lines(part: Piece | Block, text_of: TextOf) -> Iterator[tuple[int, bytes]]:
    """Yield offset and text of each document."""
    if isinstance(part, Block):
        data, offset = part.lines.data, part.lines.offset
    else:
        data, offset = _bytes_of(part), part.start
    for number, line in enumerate(io.BytesIO(data)):
        if line.strip():
            try:
                text = text_of(_parsed(line))
            except ValueError as error:
                if isinstance(part, Block):
                    place = f"{part.file.path}:{part.lines.line + number}"
                else:
                    place = _place(part.file, offset)
                raise UserError(f"{place}: {error}") from None
            yield offset, text
        offset += len(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _cut_text(text: bytes) -> Iterator[tuple[bool, bytes]]:
    """Cut a document's text as ``_cut`` does; yield whether a piece is the first, and its text."""
    start = 0
    while True:
        end = min(start + TASK_BYTES, len(text))
        if end < len(text):
            end -= _excess(text[max(start, end - _CUT_WINDOW) : end])
        yield not start, text[start:end]
        if end == len(text):
            return
        start = end


def _place(file: InputFile, offset: int) -> str:
    """Return FILE:LINE of a byte offset; lines are only counted for an error."""
    line = 1
    with open(file.path, "rb") as stream:
        while offset > 0 and (block := stream.read(min(offset, TASK_BYTES))):
            line += block.count(b"\n")
            offset -= len(block)
    return f"{file.path}:{line}"


# ---------------------------------------------------------------------------- encoding


@dataclass
class Encoder:
    """Encoder of pieces; every document begins with BOS, and a byte order mark is removed.

    A document longer than a piece is encoded piece by piece: exact with bytes, and with
    SentencePiece except for a dummy space at the start of a text.
    """

    tokenizer: Tokenizer
    text_of: TextOf
    val_fraction: float

    def __post_init__(self) -> None:
        self._counter = self.tokenizer.byte_counter()
        dtype = token_dtype(self.tokenizer.vocab_size)
        self._bos = np.array([self.tokenizer.bos_id], dtype=dtype)

    def __call__(self, task: Selected | list[Part]) -> Encoded:
        """Read and encode the parts of a task; all of them unless documents are selected.

        Raises:
            UserError: a bad line of a .jsonl file, by name and number; or the documents have
                changed since the selection.
        """
        parts = task.parts if isinstance(task, Selected) else task
        keep = task.keep if isinstance(task, Selected) else None
        result = Encoded()
        number = 0
        for part in parts:
            result.bytes_read += _consumed(part)
            for text in read_texts(part, self.text_of, self.val_fraction):
                number += text.begins
                if keep is not None and number >= len(keep):
                    raise input_changed()
                if keep is None or keep[number]:
                    self._add(result, text.split, text.data, text.begins)
        if keep is not None and number != len(keep) - 1:
            raise input_changed()
        return result.joined()

    def _add(self, result: Encoded, split: Split, text: bytes, begins: bool) -> None:
        if begins:
            result.tokens[split].append(self._bos)
            result.documents[split] += 1
        ids = self.tokenizer.encode(text)
        result.tokens[split].append(ids)
        result.text_bytes[split] += len(text)
        result.counted_bytes[split] += self._counted_bytes(ids, begins)

    def _counted_bytes(self, ids: Tokens, begins: bool) -> int:
        """Return the bytes of text that a piece's tokens encode, in little memory."""
        # The previous token of a piece that continues a document may be any id but BOS.
        before = [self.tokenizer.bos_id] if begins else ids[:1].tolist()
        total = 0
        for start in range(0, len(ids), _COUNTED_TOKENS):
            target = ids[start : start + _COUNTED_TOKENS]
            prev = np.concatenate([before, target[:-1]])
            total += int(self._counter.count(prev, target).sum())
            before = target[-1:].tolist()
        return total
