from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_dist.data import corpus, documents
from jepa_dist.data.corpus import InputFile
from jepa_dist.data.documents import Encoder, tasks
from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.record_files import TextOf
from jepa_dist.data.shards import find_shards, read_shard
from jepa_dist.data.tokenizer import load_tokenizer
from tests.support.commands import TAG, command_line_of, tagged_processes
from tests.support.golden_cases import GOLDEN_DIR, Case, cases
from tests.support.patience import patience, wait_until
from tests.support.prepared import BOS, documents_of, prepared, tokens_of, write_jsonl


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["low", "tide", "h\u00e9ron", "\u6c34", "runs", "\n", "deep", "\U0001f30a"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 40))) for i in range(count)]


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of so many texts that they are not prepared soon."""
    path = tmp_path_factory.mktemp("long") / "a.jsonl"
    write_jsonl(path, texts(300_000))
    return path


def assert_partition(out: Path, expected: list[bytes]) -> None:
    """Assert that both splits together are the documents, each split in their order."""
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert sorted(train + val) == sorted(expected)
    assert [text for text in expected if text in set(train)] == train
    assert [text for text in expected if text in set(val)] == val


# ---------------------------------------------------------------------------- inputs


def test_jsonl_lines_are_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = texts(300)
    write_jsonl(tmp_path / "a.jsonl", written, field="body")
    (tmp_path / "a.jsonl").open("a").write("\n  \n")
    out = tmp_path / "out"
    options = ["--out", str(out), "--field", "body", "--workers", "1", "--val-fraction", "0.1"]
    assert main([str(tmp_path / "a.jsonl"), *options]) == 0
    assert_partition(out, [text.encode() for text in written])
    meta = read_meta(out)
    assert meta is not None
    assert meta.documents["train"] + meta.documents["val"] == 300
    assert 10 < meta.documents["val"] < 60
    assert meta.tokens == {s: len(tokens_of(out, s)) for s in ("train", "val")}
    assert (meta.tokenizer, meta.vocab_size, meta.bos_id) == ("bytes", 257, 256)
    text_bytes = sum(len(text.encode()) for text in written)
    assert sum(meta.text_bytes.values()) == sum(meta.counted_bytes.values()) == text_bytes
    assert str(tmp_path) in capsys.readouterr().out


def test_all_files_of_a_folder_are_read_in_name_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    expected = []
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (folder / name).write_text(f"text of {name}")
        expected.append(f"text of {name}".encode())
    (folder / "empty.txt").write_text("")
    (folder / "notes.md").write_text("not mine")
    (tmp_path / "val.txt").write_text("for validation")
    out = tmp_path / "out"
    options = ["--out", str(out), "--workers", "1"]
    assert main([str(folder), "--val", str(tmp_path / "val.txt"), *options]) == 0
    assert documents_of(out, "train") == expected
    assert documents_of(out, "val") == [b"for validation"]


def test_a_separator_cuts_a_text_into_documents(tmp_path: Path) -> None:
    written = [text.replace("\n", " ") for text in texts(200)]
    (tmp_path / "a.txt").write_text("\n--\n".join(["", *written, ""]))
    out = tmp_path / "out"
    options = ["--out", str(out), "--workers", "1", "--separator", r"\n--\n"]
    assert main([str(tmp_path / "a.txt"), *options, "--val-fraction", "0.2"]) == 0
    assert_partition(out, [text.encode() for text in written])


@pytest.mark.parametrize("case", cases("bpb"))
def test_sentencepiece_text_becomes_the_golden_shards(case: Case, tmp_path: Path) -> None:
    files = case.info["files"]
    if case.info["document_wrapping"] != "bos + document":
        pytest.skip("prepare wraps documents in one way only")
    out = tmp_path / "out"
    inputs = [str(GOLDEN_DIR / files["train_text"]), "--val", str(GOLDEN_DIR / files["val_text"])]
    options = ["--tokenizer", str(GOLDEN_DIR / files["tokenizer"]), "--separator", r"\n\x1e\n"]
    assert main([*inputs, *options, "--out", str(out), "--workers", "2"]) == 0
    assert tokens_of(out, "val") == case.arrays()["tokens_all"].tolist()


# ---------------------------------------------------------------------------- pieces


@given(
    text=st.text(alphabet="ab\n\r\u00e9\u6c34\U0001f30a|", max_size=400),
    separator=st.sampled_from([None, b"|", b"||", b"\n\n", b"\r\n", b"a\n|\n", b"ab"]),
    task_bytes=st.integers(8, 40),
)
@settings(max_examples=200, deadline=None)
def test_documents_do_not_depend_on_block_boundaries(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    separator: bytes | None,
    task_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    data = text.encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TASK_BYTES", task_bytes)
        patch.setattr(documents, "_CUT_WINDOW", 6)
        cut = list(tasks([InputFile(path, "a.txt", len(data))], separator))
        pieces = [piece for task in cut for piece in task]
        encoder = Encoder(load_tokenizer("bytes"), TextOf(), 0.0)
        tokens = [t for task in cut for array in encoder(task).tokens["train"] for t in array]
    line_ends = re.escape(separator or b"").replace(b"\\\r", b"").replace(b"\\\n", b"\r?\n")
    expected = re.split(line_ends, data) if separator else [data]
    assert tokens == [t for document in expected if document for t in (BOS, *document)]
    for piece in pieces:
        assert piece.stop - piece.start <= task_bytes
        data[piece.start : piece.stop].decode()  # no character was cut


@given(sizes=st.lists(st.integers(0, 60), max_size=30), task_bytes=st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_lines_do_not_depend_on_block_boundaries(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], task_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(b"\n".join(b"x" * size for size in sizes))
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TASK_BYTES", task_bytes)
        pieces = [p for task in tasks([InputFile(path, "a", size)], None) for p in task]
    data = path.read_bytes()
    assert b"".join(data[p.start : p.stop] for p in pieces) == data
    assert all(data[: p.stop].endswith(b"\n") for p in pieces[:-1])


# ---------------------------------------------------------------------------- one result


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write some 6 MB in files of both kinds, enough for several tasks."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(8000))
    (folder / "b.txt").write_text("|".join(texts(25_000, seed=1)))
    for i in range(50):
        (folder / f"c{i}.txt").write_text(texts(1, seed=i)[0])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_result_does_not_depend_on_the_processes(mixed: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        options = ["--separator", "|", "--shard-tokens", "1000000", "--workers", str(workers)]
        assert main([str(mixed), "--out", str(out), *options]) == 0
        results.append(prepared(out))
    assert results[0] == results[1] == results[2]
    assert len(find_shards(str(tmp_path / "out1" / "train_*.bin"), "test")) > 2
    counts = [len(read_shard(p)) for p in find_shards(f"{tmp_path}/out1/train_*.bin", "test")]
    assert set(counts[:-1]) == {1_000_000}


def test_a_second_run_does_nothing(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(mixed), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_result_is_never_overwritten_silently(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(mixed), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 0
    before = prepared(out)
    changed = [*arguments, "--val-fraction", "0.2"]
    assert main(changed) == 2
    assert "val_fraction 0.01, now 0.2" in capsys.readouterr().err
    (mixed / "c0.txt").write_text("other text of another size")
    assert main(arguments) == 2
    assert "listing" in capsys.readouterr().err
    assert prepared(out) == before
    assert main([*changed, "--overwrite"]) == 0
    assert prepared(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_damaged_result_is_reported(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(mixed), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    (tmp_path / "out" / "val_000000.bin").unlink()
    assert main(arguments) == 2
    assert "val_000000.bin" in capsys.readouterr().err


def test_a_foreign_folder_is_not_changed(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert main([str(mixed), "--out", str(out), "--overwrite"]) == 2
    assert "was not prepared by this program" in capsys.readouterr().err
    assert prepared(out) == {"thesis.tex": b"years of work"}


# ---------------------------------------------------------------------------- user errors


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ('{"body": "x"}', r"expected an object with the text in field 'text', found the fields"),
        ('{"text": 3}', "expected an object with the text in field 'text'"),
        ("[1]", "found a list"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str, workers: str
) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_jsonl(path, texts(5000))
    lines = path.read_text().splitlines()
    lines[4000] = line
    path.write_text("\n".join(lines))
    assert main([str(path), "--out", str(out), "--workers", workers]) == 2
    (problem,) = capsys.readouterr().err.strip().splitlines()
    assert problem.startswith(f"{path}:4001: ")
    assert message in problem
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "--out", "{tmp}/out"], "{tmp}/none: no such file or folder"),
        (["{tmp}/a.csv", "--out", "{tmp}/out"], "{tmp}/a.csv: expected a file of .txt, .jsonl"),
        (["{tmp}/folder", "--out", "{tmp}/out"], "{tmp}/folder: found no .txt, .jsonl"),
        (["{tmp}/a.txt"], "--out: name the output folder"),
        (["--val", "{tmp}/a.txt"], "--val: goes with INPUT"),
        (["{tmp}/a.txt", "--out", "{tmp}/out"], "use --separator|--separator"),
        (["{tmp}/a.txt", "--out", "{tmp}/out", "--separator", ""], "--separator: is empty"),
        (["{tmp}/a.txt", "--out", "{tmp}/out", "--separator", "\\x"], "--separator '\\\\x'"),
        (["{tmp}/a.txt", "--out", "{tmp}/out", "--tokenizer", "gpt2"], "tokenizer 'gpt2'"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "folder").mkdir()
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    (problem,) = capsys.readouterr().err.strip().splitlines()
    assert message.format(tmp=tmp_path).split("|")[-1] in problem
    assert not (tmp_path / "out").exists()


def test_a_single_text_without_validation_gives_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one document")
    assert main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 2
    problem = capsys.readouterr().err
    assert "none fell into the validation split" in problem
    assert "--separator" in problem
    assert "--val INPUT" in problem


# ---------------------------------------------------------------------------- default corpus


def test_the_default_corpus_is_the_python_files_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "lib"
    expected = []
    for i in range(300):
        path = root / ("pkg" if i % 2 else "") / f"m{i:03d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"print({i})\n")
        expected.append((path.relative_to(root).as_posix(), path.read_bytes()))
    for guest in ("site-packages/x.py", "pkg/__pycache__/x.py", "pkg/x.pyc", "x.txt"):
        (root / guest).parent.mkdir(parents=True, exist_ok=True)
        (root / guest).write_text("guest")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.chdir(tmp_path)
    assert main(["--workers", "1", "--val-fraction", "0.1"]) == 0
    assert_partition(tmp_path / "data/stdlib", [text for _, text in sorted(expected)])
    by_name = [
        text
        for name, text in sorted(expected)
        if hashlib.blake2b(f"{name}:0".encode(), digest_size=8).digest()[::-1].hex() < "1999999999"
    ]
    assert documents_of(tmp_path / "data/stdlib", "val") == by_name


def test_a_python_without_sources_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "no library sources" in capsys.readouterr().err


def test_the_split_follows_the_document_not_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adding files moves no document between the splits."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_text(f"text {i}")
    options = ["--workers", "1", "--val-fraction", "0.1"]
    assert main([str(folder), "--out", str(tmp_path / "a"), *options]) == 0
    for i in range(200, 300):
        (folder / f"{i}.txt").write_text(f"text {i}")
    assert main([str(folder), "--out", str(tmp_path / "b"), *options]) == 0
    assert set(documents_of(tmp_path / "a", "val")) <= set(documents_of(tmp_path / "b", "val"))
    assert set(documents_of(tmp_path / "a", "train")) <= set(documents_of(tmp_path / "b", "train"))


# ---------------------------------------------------------------------------- interruption


def start(arguments: list[str], marker: str) -> subprocess.Popen[str]:
    """Start prepare in its own process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "jepa_dist.data.prepare", *arguments],
        env={**os.environ, TAG: marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Signal as usual: Ctrl-C goes to the process group, other signals to the one process."""
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_partial_output(
    long_file: Path, tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "a.jsonl").symlink_to(long_file)
    out, staging = tmp_path / "out", tmp_path / ".out.partial"
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(out), "--workers", "2"]
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    process = start(arguments, marker)
    try:
        shard = staging / ".train_000000.bin.partial"
        wait_until(lambda: shard.exists() and shard.stat().st_size > 1024, 20, every=0.002)
        interrupt(process, how)
        _, errors = process.communicate(timeout=patience(20))
        wait_until(lambda: not tagged_processes(marker), 10)
    finally:
        for left in tagged_processes(marker):
            left.kill()
    assert not out.exists()
    if how == signal.SIGKILL:
        assert staging.exists()
    else:
        assert process.returncode == 128 + how
        kept = f"{staging} is kept, and the same command resumes"  # on a slow machine
        message = kept if staging.exists() else "nothing was written"
        assert errors == f"interrupted; {message}\n"
    (tmp_path / "a.jsonl").unlink()
    write_jsonl(tmp_path / "a.jsonl", texts(1000))
    assert main([*arguments[:3], "--workers", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert len(documents_of(out, "train")) + len(documents_of(out, "val")) == 1000


def is_helper(process: psutil.Process) -> bool:
    """Return whether multiprocessing started it to work, not to track resources."""
    return any("spawn_main" in word for word in command_line_of(process))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_worker_is_one_error(long_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    process = start([str(long_file), "--out", str(out), "--workers", "2"], marker)
    try:
        shard = tmp_path / ".out.partial" / ".train_000000.bin.partial"
        wait_until(lambda: shard.exists() and shard.stat().st_size > 1024, 20, every=0.002)
        helper, *_ = filter(is_helper, tagged_processes(marker))
        helper.kill()
        _, errors = process.communicate(timeout=patience(20))
        wait_until(lambda: not tagged_processes(marker), 10)
    finally:
        for left in tagged_processes(marker):
            left.kill()
    assert process.returncode == 2
    assert errors.startswith("helper process ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_two_concurrent_runs_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(100_000))
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    process = start(arguments, marker)
    try:
        wait_until(
            (tmp_path / ".out.partial" / ".train_000000.bin.partial").exists, 20, every=0.002
        )
        assert main(arguments) == 2
        assert "another process is preparing this folder" in capsys.readouterr().err
        assert process.wait(patience(30)) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert read_meta(tmp_path / "out") is not None


@pytest.mark.timeout(60)
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """One text of one document, 64 MB: the peak stays far below what holding it would take."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for i in range(64):
            file.write(bytes([97 + i % 26]) * (2**20 - 1) + b"\n")
    (tmp_path / "val.txt").write_text("something else")
    code = (
        "import sys; from jepa_dist.data.prepare import main; code = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    arguments = [str(path), "--val", str(tmp_path / "val.txt"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=patience(50),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 100_000  # KiB
    assert len(read_shard(tmp_path / "out" / "train_000000.bin")) == 64 * 2**20 + 1
