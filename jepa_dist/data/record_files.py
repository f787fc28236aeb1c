"""Records with fields: extraction of their text, and readers of JSON and parquet files."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_dist.data.parquet_pages import page_sizes
from jepa_dist.errors import UserError
from jepa_dist.files import open_regular

_MOST_NAMED = 8
_NAMES = re.compile(r"\{([^{}]+)\}")
_BETWEEN = re.compile(r"[\s,]*")
_BATCH_BYTES = 1 << 24
# Equal texts may be stored only once, but each takes its full length after reading.
_MOST_ROWS = 128
# Without a buffer size, or with pre-fetching, the library holds a column of a whole row group.
_READ_BYTES = 1 << 20
# Some writers make pages of 100 MB.
_RECORDS_OF_A_PAGE = 4


@dataclass(frozen=True)
class TextOf:
    """Extractor of a record's text: one field, or several joined by a template.

    ``template`` contains names of fields in braces (``{title}\\n\\n{text}``).
    """

    field: str = "text"
    template: str | None = None

    @functools.cached_property
    def fields(self) -> list[str]:
        """Names of the fields to read."""
        names = [self.field] if self.template is None else _NAMES.findall(self.template)
        return list(dict.fromkeys(names))

    def __call__(self, record: Any) -> bytes:
        """Return the text of a record, UTF-8.

        Raises:
            ValueError: it has no text; the message says what was found.
        """
        found = {name: self._value(record, name) for name in self.fields}
        if self.template is None:
            text = found[self.field]
        else:
            text = _NAMES.sub(lambda match: found[match[1]], self.template)
        return text.encode("utf-8", "replace")

    def _value(self, record: Any, name: str) -> str:
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise ValueError(
                f"expected an object with the text in field {name!r}, found "
                f"{_describe(record, name)}; name another with --field, or remove the line"
            )
        return value


def _describe(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return f"a {type(record).__name__}"
    if field in record:
        value = record[field]
        return "null there" if value is None else f"a {type(value).__name__} there"
    more = ", ..." if len(record) > _MOST_NAMED else ""
    return f"the fields {', '.join(repr(name)[:80] for name in list(record)[:_MOST_NAMED])}{more}"


def json_records(path: Path, most_bytes: int) -> Iterator[tuple[Any, int]]:
    """Read the records of a ``.json`` file: an array of them, or a sequence.

    Yields:
        Each record, and the bytes of the file read so far.

    Raises:
        UserError: not such a file, or a record of more than ``most_bytes``, with its number.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("replace")
    text, at, read, number = "", 0, 0, 1
    is_array: bool | None = None
    with open_regular(path) as file:
        ended = False
        while True:
            match = _BETWEEN.match(text, at)
            at = at if match is None else match.end()
            problem = "nothing"
            if at < len(text):
                if is_array is None and text[at] == "[":
                    is_array, at = True, at + 1
                    continue
                is_array = bool(is_array)
                if is_array and text[at] == "]":
                    return
                try:
                    record, at = decoder.raw_decode(text, at)
                    yield record, read
                    number += 1
                    continue
                except (ValueError, RecursionError) as error:
                    problem = str(error)
            if ended and at == len(text) and not is_array:
                return
            if ended or len(text) - at > most_bytes:
                what = "" if ended else f", or larger than {most_bytes >> 20} MiB"
                raise UserError(f"{path}: record {number} is not valid JSON{what}: {problem}")
            # Doubled each time, so that a long record is not parsed again too often.
            data = file.read(max(1 << 16, len(text) - at)) or b""
            read, ended = read + len(data), not data
            text, at = text[at:] + utf8.decode(data, final=ended), 0


def parquet_records(path: Path, text_of: TextOf, most_bytes: int) -> Iterator[tuple[Any, int]]:
    """Read the records of a parquet file, with the fields of the text.

    The library holds a whole page of a column in memory, and copies. So a page much longer than a
    field may be is rejected before it is read, a field of more than ``most_bytes`` before copying.

    Yields:
        Each record, and the bytes of the file read so far.

    Raises:
        UserError: not such a file, a damaged one (by row group), a missing field, one of more than
            ``most_bytes``, a huge page, or the pyarrow package is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: needs the pyarrow package; pip install 'jepa_dist[data]'"
        ) from None
    group = offset = number = 0
    try:
        with (
            open_regular(path) as raw,
            pyarrow.parquet.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False) as file,
        ):
            missing = [name for name in text_of.fields if name not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path}: has no field {missing[0]!r}, but {', '.join(file.schema_arrow.names)}"
                    "; name another with --field"
                )
            for group in range(file.num_row_groups):
                info = file.metadata.row_group(group)
                offset = info.column(0).data_page_offset
                rows = _BATCH_BYTES * info.num_rows // max(1, info.total_byte_size)
                rows = max(1, min(rows, _MOST_ROWS))
                _check_pages(path, group, info, text_of.fields, most_bytes)
                batches = file.iter_batches(rows, row_groups=[group], columns=text_of.fields)
                for batch in batches:
                    _check_lengths(path, batch, number, most_bytes)
                    number += batch.num_rows
                    for record in batch.to_pylist():
                        yield record, offset
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{path}: damaged parquet data in row group {group} (from byte {offset}): {reason}; "
            "restore the file from an intact copy"
        ) from None


def _check_pages(path: Path, group: int, info: Any, fields: Sequence[str], most_bytes: int) -> None:
    """Raise if a row group has a page that is too large to hold in memory.

    Raises:
        UserError: a page of these fields is longer than several records of ``most_bytes``.
    """
    most = _RECORDS_OF_A_PAGE * most_bytes
    for chunk in map(info.column, range(info.num_columns)):
        if chunk.path_in_schema not in fields or chunk.total_uncompressed_size <= most:
            continue
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        with open_regular(path) as file:
            longest = max(page_sizes(file, start, start + chunk.total_compressed_size), default=0)
        if longest > most:
            raise UserError(
                f"{path}: row group {group} has a page of {longest >> 20} MiB in "
                f"{chunk.path_in_schema!r}, which would be held whole; at most {most >> 20} MiB "
                f"are read, and {most_bytes >> 20} MiB are one document: split long records, or "
                "write the file with smaller pages"
            )


def _check_lengths(path: Path, batch: Any, number: int, most_bytes: int) -> None:
    """Raise for a field of more than ``most_bytes`` in a batch that begins at record ``number``."""
    if batch.nbytes <= most_bytes:
        return
    import pyarrow.compute

    for column in batch.columns:
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            lengths = pyarrow.compute.binary_length(column).to_pylist()
            longest = max(range(len(lengths)), key=lambda row: lengths[row] or 0)
            if (lengths[longest] or 0) > most_bytes:
                raise UserError(
                    f"{path}: record {number + longest + 1} has a text of "
                    f"{lengths[longest] >> 20} MiB; at most {most_bytes >> 20} MiB are one "
                    "document: split it"
                )
