"""Exact duplicates among documents, which ``prepare`` drops."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_dist.data import documents
from jepa_dist.data.duplicates import Duplicates
from jepa_dist.data.meta import META_NAME, read_meta
from jepa_dist.data.prepare import main
from jepa_dist.errors import UserError
from tests.support.prepared import documents_of, prepared

RANDOM = random.Random(0)
# Some longer than the pieces that long documents are cut into below.
TEXTS = [f"text {n} " + "word " * n for n in range(60)]
TRAIN = [RANDOM.choice(TEXTS) for _ in range(150)]
VAL = [TEXTS[3], TEXTS[50], TEXTS[3], "only here"]


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    train, val = write_lines(tmp_path / "t.jsonl", TRAIN), write_lines(tmp_path / "v.jsonl", VAL)
    return [train, "--val", val, "--workers", "1"]


def first_of_each(texts: list[str], without: list[str]) -> list[bytes]:
    return [text.encode() for text in dict.fromkeys(texts) if text not in without]


@pytest.mark.parametrize("task_bytes", [50, 1 << 20])
def test_one_of_equal_documents_stays(
    tmp_path: Path,
    inputs: list[str],
    task_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", task_bytes)
    assert main([*inputs, "--out", str(tmp_path / "out")]) == 0
    train = documents_of(tmp_path / "out", "train")
    assert train == first_of_each(TRAIN, VAL)
    assert documents_of(tmp_path / "out", "val") == [text.encode() for text in VAL]
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    of_val = sum(text in VAL for text in TRAIN)
    earlier = len(TRAIN) - of_val - len(train)
    assert meta.duplicates == {"earlier": earlier, "validation": of_val}
    assert meta.documents == {"train": len(train), "val": len(VAL)}
    message = f"dropped from training: {earlier} of an earlier document, {of_val} of a validation"
    assert message in capsys.readouterr().err


def test_equal_documents_are_in_one_split_and_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if entire files are equal, in any folders."""
    names = [write_lines(tmp_path / name, TRAIN) for name in ("a.jsonl", "b.jsonl")]
    command = [*names, "--workers", "1", "--val-fraction", "0.3"]
    out = tmp_path / "out"
    assert main([*command, "--out", str(out)]) == 0
    dropped = 2 * len(TRAIN) - len(set(TRAIN))
    assert f"duplicates dropped: {dropped} of an earlier document" in capsys.readouterr().err
    found = [documents_of(out, split) for split in ("train", "val")]
    assert sorted(found[0] + found[1]) == sorted(text.encode() for text in set(TRAIN))
    assert main([*command, "--keep-duplicates", "--out", str(tmp_path / "all")]) == 0
    kept = [documents_of(tmp_path / "all", split) for split in ("train", "val")]
    assert len(kept[0] + kept[1]) == 2 * len(TRAIN)
    assert [set(documents) for documents in kept] == [set(documents) for documents in found]


def test_text_files_are_compared_as_lines_are(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", 64)
    monkeypatch.setattr(documents, "_CUT_WINDOW", 16)
    for name, texts in (("t.txt", TRAIN), ("v.txt", VAL)):
        (tmp_path / name).write_text("\n\n".join(texts))
    text = [str(tmp_path / "t.txt"), "--val", str(tmp_path / "v.txt"), "--workers", "1"]
    assert main([*text, "--separator", r"\n\n", "--out", str(tmp_path / "text")]) == 0
    assert main([*inputs, "--out", str(tmp_path / "lines")]) == 0
    same = [
        {n: data for n, data in prepared(tmp_path / name).items() if n != META_NAME}
        for name in ("text", "lines")
    ]
    assert same[0] == same[1]


def test_duplicates_can_be_kept_and_older_outputs_are_accepted(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*inputs, "--out", str(tmp_path / "out")]
    assert main([*command, "--keep-duplicates"]) == 0
    assert documents_of(tmp_path / "out", "train") == [text.encode() for text in TRAIN]
    assert main(command) == 2
    assert "was prepared with deduplicate False, now True" in capsys.readouterr().err
    path = tmp_path / "out" / META_NAME
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != "deduplicate"}))
    assert main(command) == 0
    assert "already prepared" in capsys.readouterr().out


# A document: its text, its split, and the number of pieces that it is cut into.
made = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 3)), max_size=30)


@given(made=made, cuts=st.lists(st.integers(0, 90), max_size=6), in_validation=st.booleans())
@settings(max_examples=100, deadline=None)
def test_selection_follows_the_rule(
    made: list[tuple[int, bool, int]], cuts: list[int], in_validation: bool
) -> None:
    """Against the rule over sets, with tasks that end anywhere, also inside documents."""
    if in_validation:  # equal documents share their split
        made = [(says, says % 2 == 0, parts) for says, _, parts in made]
    texts = [
        bytes([says, part, *[0] * 14, is_val, not part])
        for says, is_val, parts in made
        for part in range(parts)
    ]
    ends = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
    tasks = [texts[a:b] for a, b in pairwise(ends)]
    duplicates = Duplicates(in_validation)
    for task in tasks:
        duplicates.add(b"".join(task))
    duplicates.find()
    val = {(says, parts) for says, is_val, parts in made if is_val}
    seen: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    expected = []
    for says, is_val, parts in made:
        if is_val:
            expected.append(not in_validation or (says, parts) not in seen[True])
        else:
            expected.append((says, parts) not in val | seen[False])
        seen[is_val].add((says, parts))
    empty: list[list[documents.Part]] = [[] for _ in tasks]
    keep = [selected.keep for selected in duplicates.selected(empty)]
    assert np.concatenate([[], *(each[1:] for each in keep)]).tolist() == expected
    begun = 0
    for task, each in zip(tasks, keep, strict=True):
        assert each[0] == (expected[begun - 1] if begun else True)
        begun += sum(text[-1] for text in task)
    assert duplicates.total == expected.count(False)


def test_input_that_changes_meanwhile_is_an_error() -> None:
    duplicates = Duplicates(in_validation=False)
    duplicates.add(bytes(16) + b"\0\1")
    duplicates.find()
    for tasks in ([], [[], []]):
        with pytest.raises(UserError, match="changed while it was read"):
            list(duplicates.selected(tasks))
