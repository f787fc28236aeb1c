"""``prepare`` after ``kill -9`` or a signal: the same command resumes, and makes the same files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_dist.data import documents, journal
from jepa_dist.data.journal import JOURNAL
from jepa_dist.data.prepare import main
from jepa_dist.data.prepared_output import ShardSet
from jepa_dist.data.shuffle import ShuffledDocuments
from tests.support.prepared import write_jsonl

TEXTS = [f"document {n % 190} " + "word " * (n % 40) for n in range(200)]  # ten duplicates


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make many small tasks, with a journal entry for each."""
    monkeypatch.setattr(documents, "TASK_BYTES", 700)
    monkeypatch.setattr(journal, "_SECONDS", 0.0)
    monkeypatch.setattr(journal, "_PAUSES", 0.0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--workers", "1", "--shard-tokens", "2500", "--val-fraction", "0.1"]
    return [str(text), "--out", str(out), *fixed, *more]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def killed_after(writes: int, arguments: list[str]) -> bool:
    """Prepare in a process that kills itself in the given write; return whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(writes))
        for sink in (ShardSet, ShuffledDocuments):

            def write(self: Any, tokens: Any, of_class: Any = sink.write) -> None:
                if next(left, None) is None:
                    half = len(tokens) // 2
                    of_class(self, tokens[:half])  # in the middle of what belongs together
                    os.kill(os.getpid(), signal.SIGKILL)
                of_class(self, tokens)

            sink.write = write  # type: ignore[method-assign]
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("more", [(), ("--shuffle", "3"), ("--keep-duplicates",)])
def test_resumes_after_a_kill_at_any_write(
    text: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert main(command(text, tmp_path / "whole", *more)) == 0
    expected = files_of(tmp_path / "whole")
    assert len(expected) > 4
    kills = 0
    for writes in (0, 1, 5, 12, 19, 30, 43, 60):
        out = tmp_path / f"out{writes}"
        arguments = command(text, out, *more)
        kills += killed_after(writes, arguments)
        assert main(arguments) == 0
        assert files_of(out) == expected, writes
        assert not (tmp_path / f".out{writes}.partial").exists()
    assert kills >= 5


def test_killed_again_and_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each attempt makes some progress."""
    assert main(command(text, tmp_path / "whole", "--shuffle", "3")) == 0
    arguments = command(text, tmp_path / "out", "--shuffle", "3")
    done = []
    for _ in range(4):
        assert killed_after(5, arguments)
        done.append(json.loads((tmp_path / ".out.partial" / JOURNAL).read_text())["tasks"])
    assert done[0] < done[1] < done[2] < done[3]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "resuming after " in capsys.readouterr().err
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("more", [(), ("--shuffle", "3")], ids=["plain", "shuffled"])
def test_interrupted_and_resumed(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    number: int,
    code: int,
) -> None:
    assert main(command(text, tmp_path / "whole", *more)) == 0
    arguments = command(text, tmp_path / "out", *more)
    done = []
    for writes in (12, 19):
        with monkeypatch.context() as patch:
            interrupt_after(writes, number, patch)
            capsys.readouterr()
            assert main(arguments) == code
        staging = tmp_path / ".out.partial"
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"interrupted; {staging} is kept, and the same command resumes"
        assert not (tmp_path / "out").exists()
        done.append(json.loads((staging / JOURNAL).read_text())["tasks"])
    assert 0 < done[0] < done[1]
    assert main(arguments) == 0
    assert "resuming after " in capsys.readouterr().err
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not staging.exists()


def interrupt_after(writes: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """Signal this process in the middle of the given write."""
    left = iter(range(writes))
    for sink in (ShardSet, ShuffledDocuments):

        def write(self: Any, tokens: Any, of_class: Any = sink.write) -> None:
            half = len(tokens) // 2
            of_class(self, tokens[:half])
            if next(left, None) is None:
                os.kill(os.getpid(), number)
            of_class(self, tokens[half:])

        patch.setattr(sink, "write", write)


def test_interrupted_before_the_first_journal_entry(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "_SECONDS", 100.0)
    interrupt_after(12, signal.SIGINT, monkeypatch)
    assert main(command(text, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_error_removes_the_partial_output(text: Path, tmp_path: Path) -> None:
    with text.open("a") as file:
        file.write("{oops")
    assert main(command(text, tmp_path / "out", "--keep-duplicates")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, text: (folder / JOURNAL).write_text("{}"),
        lambda folder, text: (folder / JOURNAL).write_text("\0" * 100),
        lambda folder, text: next(folder.glob(".train*.partial")).write_bytes(b"short"),
        lambda folder, text: next(folder.glob(".train*.partial")).unlink(),
        lambda folder, text: (folder / "train_000000.bin").write_bytes(b"short"),
        lambda folder, text: text.write_text(text.read_text().replace("word", "work")),
    ],
)
def test_changed_input_or_settings_start_anew(spoil: Any, text: Path, tmp_path: Path) -> None:
    arguments = command(text, tmp_path / "out")
    assert killed_after(30, arguments)
    spoil(tmp_path / ".out.partial", text)
    assert main(arguments) == 0
    assert main(command(text, tmp_path / "whole")) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_links_planted_beside_it_are_not_followed(text: Path, tmp_path: Path) -> None:
    arguments = command(text, tmp_path / "out")
    assert killed_after(30, arguments)
    elsewhere = tmp_path / "mine"
    elsewhere.write_bytes(np.zeros(5000, np.uint16).tobytes())
    before = elsewhere.read_bytes()
    partial = next((tmp_path / ".out.partial").glob(".train*.partial"))
    partial.unlink()
    partial.symlink_to(elsewhere)
    assert main(arguments) == 0
    assert elsewhere.read_bytes() == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
