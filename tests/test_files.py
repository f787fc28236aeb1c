"""Only regular files of a bounded size are opened; nothing is written through a link or a FIFO."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_dist.errors import UserError
from jepa_dist.files import (
    MIB,
    check_regular,
    open_to_append,
    read_bytes,
    read_json,
    read_lines,
    write_atomically,
)
from jepa_dist.monitor.history import read_starts
from jepa_dist.monitor.metrics_file import HELD_BYTES, decode, encode, number, read_records

pytestmark = pytest.mark.timeout(20)

_REFUSED = "not a regular file|No such|Too many|Is a directory|No such device"

SURPRISES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("surprise", SURPRISES.values(), ids=SURPRISES)
def test_special_files_are_refused_at_once(
    tmp_path: Path, surprise: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    surprise(path)
    for read in (
        check_regular,
        lambda path: read_bytes(path, 100),
        lambda path: list(read_lines(path)),
    ):
        with pytest.raises(OSError, match=_REFUSED) as caught:
            read(path)
        assert caught.value.strerror
    if path.exists():
        with pytest.raises(OSError, match=_REFUSED):
            open_to_append(path)


def test_sizes_are_bounded_and_files_of_proc_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="10 bytes, but such a file may have at most 9"):
        read_bytes(path, 9)
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match="at most"):
        read_json(path, 2**20)
    assert read_bytes(Path("/proc/self/status"), 100) == b""


def test_lines_are_read_up_to_the_size_that_the_file_had(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nthr")
    lines = read_lines(path)
    assert next(lines) == b"one\n"
    with path.open("ab") as file:
        file.write(b"ee\nfour\n")
    assert list(lines) == [b"two\n", b"thr"]
    path.write_bytes(b"x" * (9 * 2**20) + b"\n{}\n")
    assert [len(line) for line in read_lines(path)] == [2**22, 2**22, 2**20 + 1, 3]


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "folder"])
def test_nothing_is_written_through_links_or_fifos(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # an attacker may guess the name
        patch.setattr("jepa_dist.files.partial_name", lambda path: tmp_path / ".file.partial")
        _plant(tmp_path, kind)
        with pytest.raises(FileExistsError):
            write_atomically(tmp_path / "file", "text")
    _plant(tmp_path, kind)
    write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    other = tmp_path / "other"
    assert other.read_text() == "as it was" if kind == "link" else not other.exists()
    assert not list(tmp_path.glob(".file.*.partial"))


def _plant(tmp_path: Path, kind: str) -> None:
    """Create an entry at a path that an earlier version wrote to."""
    other, partial = tmp_path / "other", tmp_path / ".file.partial"
    if kind == "link":
        other.write_text("as it was")
    if os.path.lexists(partial):
        return
    if kind == "fifo":
        os.mkfifo(partial)
    elif kind == "folder":
        partial.mkdir()
    else:
        partial.symlink_to(other)


# ---------------------------------------------------------------------------- metrics.jsonl


def test_nan_and_infinity_are_null_with_a_reason(tmp_path: Path) -> None:
    record = {"step": 3, "a": math.nan, "b": -math.inf, "c": 1.5, "d": None}
    table = {"jepa/cos_table": {"lengths": [1, 2], "cos": [[0.5, math.nan]]}}
    line = encode({**record, **table})
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (strict["a"], strict["b"], strict["c"], strict["d"]) == (None, None, 1.5, None)
    assert strict["not_finite"] == {"a": "nan", "b": "-inf", "jepa/cos_table.cos.0.1": "nan"}
    assert strict["jepa/cos_table"]["cos"] == [[0.5, None]]
    back = decode(line)
    assert back is not None
    assert math.isnan(back["a"])
    assert (back["b"], back["c"], back["d"]) == (-math.inf, 1.5, None)
    assert encode(back) == line, "rewriting a file changes nothing"
    assert decode(b'{"step": 1, "old": NaN}') is not None, "lines of earlier versions"


def test_invalid_records(tmp_path: Path) -> None:
    for line in (b"", b"{", b"[]", b"{}", b'{"step": "1"}', b'{"step": true}', b'{"step": -1}'):
        assert decode(line) is None
    assert decode(b'{"step": 1%s}' % (b"0" * 30)) is None
    assert decode(b"[" * 10_000) is None
    # As json.dumps writes lone surrogates.
    assert decode(b'{"step": 1, "a": "\\ud800"}') == {"step": 1, "a": "\ud800"}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n{"step": 2}')
    assert [None if r is None else r["step"] for r in read_records(path)] == [1, None, 2]


def test_numbers_are_numbers() -> None:
    record = {"a": 1, "b": 2.5, "c": True, "d": "3", "e": None, "f": 10**400, "g": [1]}
    assert {key: number(record, key) for key in [*record, "missing"]} == {
        **dict.fromkeys([*"cdefg", "missing"], None),
        **{"a": 1.0, "b": 2.5},
    }


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.integers(0, 2**53 - 1), st.dictionaries(st.text(), VALUES, max_size=6))
def test_records_survive_the_file(step: int, values: dict[str, Any]) -> None:
    values = {key: value for key, value in values.items() if key != "not_finite"}
    record = {**values, "step": step}
    back = decode(encode(record))
    assert back is not None
    for key, value in record.items():
        if isinstance(value, float):
            assert back[key] == value or (math.isnan(back[key]) and math.isnan(value))
        elif not isinstance(value, dict | list):
            assert back[key] == value


@pytest.mark.parametrize(
    ("name", "limit", "read"),
    [
        ("metrics.jsonl", HELD_BYTES, lambda path: list(read_records(path, HELD_BYTES))),
        ("starts.jsonl", 64 * MIB, lambda path: read_starts(path.parent)),
    ],
)
def test_lines_of_more_than_the_limit_are_refused_unread(
    tmp_path: Path, name: str, limit: int, read: Callable[[Path], object]
) -> None:
    """The file is sparse: reading its zeros as lines would take gigabytes."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises((OSError, UserError)) as caught:
        read(path)
    assert name in str(caught.value)
