"""Damaged, hostile or mistaken data: one clear line, within limits of time and memory."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jepa_dist.command_line import list_commands
from jepa_dist.config import Config
from jepa_dist.data.baseline import MOST_TOKENS, ngram_baseline
from jepa_dist.data.check import check_data
from jepa_dist.data.meta import read_meta
from jepa_dist.data.prepare import main
from jepa_dist.data.shards import Shard, find_shards, read_count, write_shard
from jepa_dist.errors import UserError
from tests.support.limits import run_limited
from tests.support.patience import patience

HEADER = 1024


def config(folder: Path, **data: Any) -> Config:
    values = {"train": f"{folder}/train_*.bin", "val": f"{folder}/val_*.bin", **data}
    return Config.model_validate({"model": {"seq_len": 16, "vocab_size": 257}, "data": values})


def header(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}i", *words).ljust(HEADER, b"\0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for first, name in enumerate(("train_0", "train_1", "val_0")):
        write_shard(folder / f"{name}.bin", np.arange(first, first + 100))
    return folder


def assert_one_line(problem: str, *parts: str) -> None:
    assert "Traceback" not in problem
    assert len(problem.strip().splitlines()) == 1, problem
    assert len(problem) < 1000
    for part in parts:
        assert part in problem


# ---------------------------------------------------------------------------- shards


def sparse(path: Path, size: int, start: bytes) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return replace


def contents(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


SHARDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "three bytes": (contents(b"abc"), "3 bytes are too few"),
    "negative count that fits": (lambda p: sparse(p, 1022, header(20240520, 1, -1)[:1022]), "few"),
    "negative count": (contents(header(20240520, 1, -5)), "promises -5 tokens"),
    "huge count": (contents(header(20240520, 1, 2**31 - 1)), "promises 2147483647 tokens"),
    "count above 2^31": (
        lambda p: sparse(p, HEADER + 2 * (2**31 + 7), header(20240520, 1, -(2**31) + 7)),
        "more than the int32 of a header can count",
    ),
    "llama 3": (contents(header(20240801, 7, 4) + bytes(8)), "promises 4 tokens"),
    "version": (contents(header(20240520, 2, 0)), "version 2, expected 1"),
    "nanoGPT": (contents(np.arange(2000, dtype="<u2").tobytes()), "bare uint16 ids"),
    "LFS pointer": (contents(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "gzip": (contents(gzip.compress(bytes(9999))), "gunzip"),
    "numpy": (contents(b"\x93NUMPY\x01\x00" + bytes(2000)), "NumPy"),
    "dangling link": (link("gone.bin"), "a link to a missing file"),
    "link to itself": (link("train_1.bin"), "cannot be read"),
    "FIFO": (fifo, "not a regular file"),
    "device": (link("/dev/zero"), "not a regular file"),
    "endless file of no size": (link("/proc/self/environ"), "too few"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_an_invalid_shard_is_one_line(folder: Path, name: str) -> None:
    make, message = SHARDS[name]
    make(folder / "train_1.bin")
    outcome = run_limited(lambda: check_data(config(folder)))
    assert outcome.kind == "refused", outcome.text
    assert_one_line(outcome.text, str(folder / "train_1.bin"), message)


@given(start=st.binary(max_size=2000) | st.builds(header, *[st.integers(-(2**31), 2**31 - 1)] * 4))
@settings(max_examples=200, deadline=2000)
def test_any_bytes_are_a_shard_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(start)
    try:
        count = read_count(path)
    except UserError as error:
        assert_one_line(str(error), str(path))
    else:
        assert len(start) == HEADER + 2 * count


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/**/*.bin", "would search the whole file system"),
        ("/**", "would search the whole file system"),
        ("{folder}", "a folder"),
        ("{folder}/none_*.bin", "no token shard matches"),
    ],
)
def test_patterns_are_resolved_quickly(folder: Path, pattern: str, message: str) -> None:
    changed = config(folder, train=pattern.format(folder=folder))
    outcome = run_limited(lambda: check_data(changed))
    assert outcome.kind == "refused", outcome.text
    assert "data.train=" in outcome.text
    assert message in outcome.text.splitlines()[0]


def test_brackets_in_a_path_are_literal(folder: Path) -> None:
    odd = folder.rename(folder.with_name("run[1]*?"))
    write_shard(odd / "t[ab].bin", np.arange(50))
    assert [p.name for p in find_shards(f"{odd}/train_*.bin", "x")] == [
        "train_0.bin",
        "train_1.bin",
    ]
    assert find_shards(f"{odd}/t[ab].bin", "x") == [odd / "t[ab].bin"]
    assert [p.name for p in find_shards(f"{odd}/train_[01].bin", "x")] == [
        "train_0.bin",
        "train_1.bin",
    ]


def test_validation_shards_are_not_trained_on(folder: Path) -> None:
    with pytest.raises(UserError, match=r"val_0\.bin is also trained on"):
        check_data(config(folder, train=f"{folder}/*.bin"))
    (folder / "train_2.bin").write_bytes((folder / "val_0.bin").read_bytes())
    with pytest.raises(UserError, match=r"val_0\.bin is also trained on .*train_2\.bin") as error:
        check_data(config(folder))
    assert_one_line(str(error.value))
    write_shard(folder / "train_2.bin", np.arange(2, 102)[::-1])  # as many, but others
    check_data(config(folder))


def test_small_validation_shards_are_one_stream(tmp_path: Path) -> None:
    """Training validates on the same windows as evaluate: they run through several shards."""
    write_shard(tmp_path / "train_0.bin", np.arange(100))
    for i in range(4):
        write_shard(tmp_path / f"val_{i}.bin", np.arange(i, i + 5))
    check_data(config(tmp_path))


def test_the_other_byte_tokenizer_is_recognized(tmp_path: Path) -> None:
    text = np.frombuffer(b"a line of text\nand another one\n" * 20, np.uint8)
    for split in ("train", "val"):
        ids = np.concatenate([[1], text + 4, [ord(split[0]) + 4]])
        write_shard(tmp_path / f"{split}_0.bin", ids)
    with pytest.raises(UserError, match="another byte tokenizer, of 260 ids"):
        check_data(config(tmp_path))
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}_0.bin", np.concatenate([[256], text, [ord(split[0])]]))
    check_data(config(tmp_path))


def test_a_shard_that_shrinks_while_open_is_one_line(folder: Path) -> None:
    """With a memory map, it would be a bus error without a message."""
    shard = Shard(folder / "train_0.bin")
    assert shard.read(90, 100).tolist() == list(range(90, 100))
    os.truncate(folder / "train_0.bin", HEADER + 100)
    assert shard.read(0, 50).tolist() == list(range(50))
    with pytest.raises(UserError, match=r"train_0\.bin: truncated while in use: token 50 of 100"):
        shard.read(40, 60)


def test_baselines_read_a_sample_of_a_huge_shard(tmp_path: Path) -> None:
    tokens = 2**31 - 1
    sparse(tmp_path / "a.bin", HEADER + 2 * tokens, header(20240520, 1, tokens))
    baseline = ngram_baseline([tmp_path / "a.bin"], np.zeros((2, 9), int), 4)
    assert baseline is not None
    assert baseline.available == tokens
    assert MOST_TOKENS / 2 < baseline.counted <= MOST_TOKENS


# ---------------------------------------------------------------------------- meta.json

GOOD = {"tokenizer": "bytes", "vocab_size": 257, "shards": {}}
METAS: dict[str, bytes | str] = {
    "empty": "",
    "no object": "[]",
    "cut off": '{"tokenizer": "bytes", ',
    "not UTF-8": b"\xff\xfe{}",
    "nested": '{"source": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "no fields": "{}",
    "wrong types": json.dumps({**GOOD, "vocab_size": "257"}),
    "null": json.dumps({**GOOD, "shards": None}),
    "bool for a number": json.dumps({**GOOD, "vocab_size": True}),
    "huge integer": '{"tokenizer": "bytes", "shards": {}, "vocab_size": ' + "9" * 6000 + "}",
    "bos outside": json.dumps({**GOOD, "bos_id": 257}),
    "bos of another type": json.dumps({**GOOD, "bos_id": "x"}),
    "NaN": '{"tokenizer": "bytes", "shards": {}, "vocab_size": NaN}',
    "lone surrogate": '{"tokenizer": "\\ud800", "shards": {}, "vocab_size": 257}',
    "parent": json.dumps({**GOOD, "shards": {"../../etc/passwd": 1}}),
    "absolute": json.dumps({**GOOD, "shards": {"/etc/passwd": 1}}),
    "folder itself": json.dumps({**GOOD, "shards": {"..": 1}}),
    "NUL": json.dumps({**GOOD, "shards": {"a\0b": 1}}),
    "link outside": json.dumps({**GOOD, "shards": {"outside.bin": 1}}),
    "negative count": json.dumps({**GOOD, "shards": {"val_0.bin": -1}}),
    "line end in a name": json.dumps({**GOOD, "shards": {"a\nb\x1b[2J": None}}),
}


@pytest.mark.parametrize("name", METAS)
def test_a_bad_meta_is_one_line(folder: Path, name: str) -> None:
    (folder / "outside.bin").symlink_to("/etc/passwd")
    text = METAS[name]
    (folder / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = run_limited(lambda: read_meta(folder))
    assert outcome.kind == "refused", outcome.text
    assert_one_line(outcome.text, f"{folder / 'meta.json'}: damaged: ", "prepare it again")


@pytest.mark.parametrize("make", [fifo, link("/dev/zero"), link("."), link("meta.json")])
def test_a_meta_that_is_not_a_file_is_one_line(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "meta.json").touch()
    make(folder / "meta.json")
    outcome = run_limited(lambda: check_data(config(folder)))
    assert outcome.kind == "refused", outcome.text
    assert "meta.json: damaged: " in outcome.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from([*GOOD, "bos_id", "documents"]), json_values))
@settings(max_examples=200, deadline=2000)
def test_any_fields_are_a_meta_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "meta.json").write_text(json.dumps({**GOOD, **changes}))
    try:
        meta = read_meta(folder)
    except UserError as error:
        assert_one_line(str(error), "meta.json: damaged: ")
    else:
        assert meta is not None
        assert all("/" not in name for name in meta.shards)


# ---------------------------------------------------------------------------- prepare

NESTED = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
INPUTS: dict[str, tuple[str, bytes | str, list[str], str]] = {
    "deep JSON": ("a.jsonl", NESTED, [], "a.jsonl:1: JSON nested too deeply"),
    "null": ("a.jsonl", '{"text": null}', [], "field 'text', found null there"),
    "huge integer": ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", [], "not valid JSON"),
    "many fields": (
        "a.jsonl",
        json.dumps({f"field {i}": 1 for i in range(10_000)}),
        [],
        "found the fields 'field 0'",
    ),
    "UTF-16": ("a.txt", "some text".encode("utf-16"), [], "is UTF-16, not UTF-8"),
    "UTF-16 without mark": ("a.txt", "some text".encode("utf-16-le"), [], "iconv -f UTF-16"),
    "UTF-32": ("a.jsonl", '{"text": "a"}'.encode("utf-32"), [], "is UTF-32, not UTF-8"),
    "gzip": ("a.txt.gz", gzip.compress(b"{}"), [], "expected a file of .txt, .jsonl"),
    "URL": ("s3://bucket/a.txt", "", [], "is a URL"),
    "the same text twice": ("a.txt", "one text", ["--val", "{in}/a.txt"], "the same file as"),
    "a copy": ("a.txt", "one text", ["--val", "{in}/copy.txt"], "the same text as"),
    "too many workers": ("a.txt", "text", ["--workers", "1000"], "from 1 to"),
    "no number": ("a.txt", "text", ["--workers", "9" * 5000], "from 1 to"),
    "shard tokens": ("a.txt", "text", ["--shard-tokens", str(2**31)], "from 1 to 2147483647"),
    "fraction": ("a.txt", "text", ["--val-fraction", "nan"], "between 0 and 1"),
    "tokenizer.json": ("a.txt", "text", ["--tokenizer", "{in}/tokenizer.json"], "Hugging Face"),
    "folder as tokenizer": ("a.txt", "text", ["--tokenizer", "{in}"], "is a folder"),
    "tokenizer with long name": ("a.txt", "text", ["--tokenizer", "x" * 5000], "too long"),
    "FIFO as tokenizer": ("a.txt", "text", ["--tokenizer", "{in}/fifo"], "not a regular file"),
    "long output": ("a.txt", "text", ["--out", "x" * 5000], "too long"),
    "output is a URL": ("a.txt", "text", ["--out", "s3://b/x"], "is a URL"),
    "output is a file": ("a.txt", "text", ["--out", "{in}/copy.txt"], "is not a folder"),
    "output is here": ("a.txt", "text", ["--out", "."], "holds the current folder"),
    "output is a mount point": ("a.txt", "text", ["--out", "/dev/shm"], "is a mount point"),
    "output in a circle": ("a.txt", "text", ["--out", "{in}/circle/x"], "cannot be a folder"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_bad_input_of_prepare_is_one_line(tmp_path: Path, name: str) -> None:
    file, data, options, message = INPUTS[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "copy.txt").write_text("one text")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "fifo")
    path = file if "://" in file else str(folder / file)
    if "://" not in file:
        (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    options = [option.replace("{in}", str(folder)) for option in options]
    arguments = [path, "--out", str(tmp_path / "out"), "--workers", "1", *options]
    outcome = run_limited(lambda: main(arguments))
    assert outcome.kind == "refused", outcome.text
    assert_one_line(outcome.text[-990:], message)
    assert not (tmp_path / "out").exists()


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "' + b"x" * 5000)
        file.truncate(300 << 20)
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    outcome = run_limited(lambda: main(arguments), seconds=60, megabytes=256)
    assert outcome.kind == "refused", outcome.text
    assert_one_line(outcome.text, "a.jsonl:2: a line of more than 64 MiB")


def test_skipped_entries_of_a_folder_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(300):
        (folder / f"{i}.TXT").write_text(f"text {i}")
    for name in ("x.txt.gz", "y.csv", "z.csv", "._0.txt", ".ipynb_checkpoints/0.txt"):
        (folder / name).write_text("not read")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert main([str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert_one_line(captured.err, "not read: ", "2 .csv", "1 .gz", "2 hidden", "1 linked folders")
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert sum(meta.documents.values()) == 300
    (folder / "gone.txt").symlink_to("nowhere")
    assert main([str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert_one_line(capsys.readouterr().err, str(folder / "gone.txt"), "a link to a missing file")


def test_overlapping_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dup/sub").mkdir(parents=True)
    (tmp_path / "dup/sub/a.txt").write_text("text")
    arguments = [str(tmp_path / "dup"), str(tmp_path / "dup/sub"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "a.txt: the same file as")


def test_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"first|" + mark + b"second")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "third"}\r\n')
    (tmp_path / "val.txt").write_bytes(b"fourth")
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    options = ["--val", str(tmp_path / "val.txt"), "--out", str(tmp_path / "out")]
    assert main([*names, *options, "--separator", "|", "--workers", "1"]) == 0
    shard = Shard(tmp_path / "out" / "train_000000.bin")
    ids = shard.read(0, shard.count).tolist()
    assert ids == [256, *b"first", 256, *b"second", 256, *b"third"]


def test_an_edit_of_equal_size_is_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("|".join(f"text {i:03d}" for i in range(300)))
    arguments = [str(path), "--separator", "|", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = path.stat()
    path.write_text(path.read_text().replace("text 123", "test 123"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "was prepared with other text in the files")
    assert main([*arguments, "--overwrite"]) == 0
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    del meta["content"]  # as an earlier version wrote it
    (tmp_path / "out/meta.json").write_text(json.dumps(meta))
    assert main(arguments) == 0


@pytest.mark.parametrize("dangling", [False, True])
def test_links_as_output_are_followed(tmp_path: Path, dangling: bool) -> None:
    (tmp_path / "a.txt").write_text("|".join(f"text {i:03d}" for i in range(300)))
    target = tmp_path / "disk" / "data"
    target.mkdir(parents=True)
    if dangling:
        target.rmdir()
    (tmp_path / "out").symlink_to(target)
    arguments = [str(tmp_path / "a.txt"), "--separator", "|", "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_symlink()
    assert read_meta(target) is not None
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["data"]


# ---------------------------------------------------------------------------- full storage

FULL = (
    "mount -t tmpfs -o size=64k tmpfs {place} && head -c 200k /dev/zero > {place}/fill 2>/dev/null;"
    'exec "$@"'
)


def run_on_full(place: Path, *command: Any) -> Any:
    """Run a command in a mount namespace of its own, where a folder is a full file system."""
    script = ["unshare", "-rm", "sh", "-c", FULL.format(place=place), "sh"]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    return subprocess.run(
        [*script, *map(str, command)], capture_output=True, text=True, timeout=patience(100)
    )


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("|".join(f"text {i:03d}" * 50 for i in range(1000)))
    (tmp_path / "disk").mkdir()
    arguments = [tmp_path / "a.txt", "--separator", "|", "--workers", "1"]
    out = tmp_path / "disk" / "out"
    done = run_on_full(
        tmp_path / "disk", sys.executable, "-m", "jepa_dist.data.prepare", *arguments, "--out", out
    )
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, str(tmp_path / "disk"), "No space left on device")


def test_a_full_temporary_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run.yaml").write_text("model: {seq_len: 16}")
    keys = [f"data.{split}={folder}/{split}_*.bin" for split in ("train", "val")]
    command = [sys.executable, "-m", "jepa_dist.train", tmp_path / "run.yaml", "--check", *keys]
    done = run_on_full(tmp_path / "tmp", "env", f"TMPDIR={tmp_path / 'tmp'}", *command)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, f"TMPDIR={tmp_path / 'tmp'}: has 0 MiB free", "needs 64")


LOAD = """
import sys
from pathlib import Path
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import TokenDataset, TrainLoader
from jepa_dist.errors import UserError
try:
    dataset = TokenDataset([Path(sys.argv[1])], 16, 257)
    with TrainLoader(dataset, BatchLayout(4, 4, 0, 1), seed=0, workers=1) as loader:
        next(loader)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.timeout(120)
def test_full_shared_memory_is_named_at_once(folder: Path) -> None:
    done = run_on_full(Path("/dev/shm"), sys.executable, "-c", LOAD, folder / "train_0.bin")
    assert done.returncode == 1
    assert_one_line(done.stderr, "/dev/shm", "No space left on device", "data.workers=0")


@pytest.mark.filterwarnings("ignore")
@example(lines=[b"", b"|", b""], separator="|")  # two equal documents
@given(lines=st.lists(st.binary(max_size=40), max_size=6), separator=st.sampled_from(["", "|"]))
@settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
def test_any_bytes_of_text_or_json_are_prepared_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    lines: list[bytes],
    separator: str,
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    name = "a.txt" if separator else "a.jsonl"
    (tmp_path / name).write_bytes(b"\n".join(lines))
    (tmp_path / "val.txt").write_bytes(b"something else to validate on, of more than forty bytes")
    options = ["--separator", separator] if separator else []
    arguments = ["--val", str(tmp_path / "val.txt"), "--workers", "1", *options]
    capsys.readouterr()
    code = main([str(tmp_path / name), *arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err.splitlines(keepends=True)
    errors = "".join(line for line in printed if not line.startswith("duplicates dropped"))
    assert (code, bool(errors)) in ((0, False), (2, True))
    if code:
        assert_one_line(errors)


# ---------------------------------------------------------------------------- modules


def test_a_module_without_command_says_so() -> None:
    for name in ("jepa_dist.generate", "jepa_dist.data.shards"):
        done = subprocess.run(
            [sys.executable, "-m", name, "RUN"],
            capture_output=True,
            text=True,
            timeout=patience(60),
        )
        assert done.returncode == 2
        assert_one_line(done.stderr, f"python -m {name}: this module is not a command")
    commands = list_commands()
    assert {"jepa_dist", "jepa_dist.train", "jepa_dist.data.prepare", "jepa_dist.evaluate"} <= set(
        commands
    )
    done = subprocess.run(
        [sys.executable, "-m", "jepa_dist.data.prepare", "--help"],
        capture_output=True,
        timeout=patience(60),
    )
    assert done.returncode == 0
