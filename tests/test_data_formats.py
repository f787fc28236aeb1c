"""The same text in any format becomes the same shards; damaged files are named."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jepa_dist.data import documents
from jepa_dist.data.compressed import read_lines
from jepa_dist.data.corpus import InputFile, Skipped, user_files
from jepa_dist.data.documents import read_texts, tasks
from jepa_dist.data.parquet_pages import page_sizes
from jepa_dist.data.prepare import main
from jepa_dist.data.record_files import TextOf, json_records
from jepa_dist.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TITLES = ["low", "tide", "h\u00e9ron", "\u6c34"]


def rows(count: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    words = [*TITLES, '"', "{", "}", "[\n", "\\", "\U0001f30a", "runs"]
    return [
        {
            "title": rng.choice(TITLES),
            "text": f"{i} " + " ".join(rng.choices(words, k=rng.randint(0, 60))),
            "n": i,
        }
        for i in range(count)
    ]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def halves(data: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    """Two members or frames, cut in the middle of a line."""
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    ".jsonl": lambda path, rows: path.write_bytes(as_lines(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(halves(as_lines(rows), gzip.compress)),
    ".jsonl.zst": lambda path, rows: path.write_bytes(
        halves(as_lines(rows), zstandard.ZstdCompressor().compress)
    ),
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    ".parquet": write_parquet,
}


def texts(file: Path, text_of: TextOf | None = None) -> list[bytes]:
    """Return the documents of a file, read in another process."""
    text_of = text_of or TextOf()
    found: list[bytes] = []
    for task in tasks([InputFile(file, file.name, file.stat().st_size, "train")], None, text_of):
        for part in pickle.loads(pickle.dumps(task)):
            for text in read_texts(part, pickle.loads(pickle.dumps(text_of)), 0.5):
                found[len(found) :] = [text.data] if text.begins else [found.pop() + text.data]
    return found


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", 700)
    monkeypatch.setattr(documents, "_CUT_WINDOW", 50)
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, rows())
    assert texts(path) == [row["text"].encode() for row in rows()]
    joined = texts(path, TextOf(template="{title}: {text} [{title}]"))
    assert joined == [f"{r['title']}: {r['text']} [{r['title']}]".encode() for r in rows()]


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_text_becomes_the_same_shards(tmp_path: Path, suffix: str) -> None:
    shards = []
    for name in (".jsonl", suffix):
        WRITERS[name](tmp_path / f"a{name}", rows())
        WRITERS[name](tmp_path / f"v{name}", rows(20, seed=1))
        out = tmp_path / f"out{name}"
        arguments = ["--val", str(tmp_path / f"v{name}"), "--workers", "1", "--out", str(out)]
        assert main([str(tmp_path / f"a{name}"), *arguments]) == 0
        shards.append({path.name: path.read_bytes() for path in out.glob("*.bin")})
    assert shards[0] == shards[1]


SPLIT_WRITERS = WRITERS | {
    ".txt": lambda path, rows: path.write_text("\n--\n".join(row["text"] for row in rows))
}


@pytest.mark.parametrize("pieces", ["some", "one"])
def test_the_split_does_not_depend_on_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: str
) -> None:
    """It also depends neither on names nor on the file that holds a document."""
    if pieces == "some":  # longer documents are cut
        for name, value in (("TASK_BYTES", 200), ("_CUT_WINDOW", 50), ("_HEAD_BYTES", 90)):
            monkeypatch.setattr(documents, name, value)
    written = [*rows(), {**rows()[7], "text": "\ufeff" + rows()[9]["text"] + " and more"}]
    shards = []
    for name, write in SPLIT_WRITERS.items():
        folder = tmp_path / f"in{name}"
        folder.mkdir()
        parts = len(shards) + 1
        for part in range(parts):
            bounds = [len(written) * n // parts for n in (part, part + 1)]
            write(folder / f"{part} of {parts}{name}", written[slice(*bounds)])
        out = tmp_path / f"out{name}"
        options = ["--val-fraction", "0.3", "--workers", "1", "--separator", r"\n--\n"]
        assert main([str(folder), *options, "--out", str(out)]) == 0
        shards.append({path.name: path.read_bytes() for path in out.glob("*.bin")})
    assert set(shards[0]) == {"train_000000.bin", "val_000000.bin"}
    assert 0.15 < len(shards[0]["val_000000.bin"]) / len(shards[0]["train_000000.bin"]) < 0.7
    assert all(each == shards[0] for each in shards)


def test_the_split_follows_the_beginning_of_a_long_document(tmp_path: Path) -> None:
    """A text file of several pieces, against a hash of its first 64 KiB."""
    texts = [f"{n} " + "word " * 300_000 for n in range(24)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n:02d}.txt").write_text(text)
    expected = [
        int.from_bytes(hashlib.blake2b(text[:65536].encode(), digest_size=8).digest(), "little")
        < 0.5 * 2**64
        for text in texts
    ]
    files = user_files([str(tmp_path)], None, Skipped())
    found: list[set[str]] = [set() for _ in files]
    for task in tasks(files, None):
        for part in task:
            for text in read_texts(part, TextOf(), 0.5):
                found[files.index(part.file)].add(text.split)
    assert found == [{"val" if is_val else "train"} for is_val in expected]
    assert 0 < sum(expected) < len(texts)


def test_a_long_record_is_cut_as_a_text_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", 300)
    monkeypatch.setattr(documents, "_CUT_WINDOW", 100)
    text = "\ufeff" + "\n".join(row["text"] for row in rows(40))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    found = []
    for name in ("a.txt", "a.jsonl"):
        file = InputFile(tmp_path / name, name, (tmp_path / name).stat().st_size, "train")
        parts = [part for task in tasks([file], None) for part in task]
        found.append([text for part in parts for text in read_texts(part, TextOf(), 0.5)])
    assert found[0] == found[1]
    assert len(found[0]) > 10


def test_a_folder_of_a_data_set_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for index in range(2):
        write_parquet(tmp_path / "data" / f"train-{index:05d}-of-00002.parquet", rows(5, index))
    for name in ("README.md", "dataset_infos.json", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    skipped = Skipped()
    files = user_files([str(tmp_path)], None, skipped)
    assert [file.name for file in files] == [
        f"data/train-{index:05d}-of-00002.parquet" for index in range(2)
    ]
    assert "1 descriptions (.json)" in str(skipped)


JSON = {
    "lines": b'{"text": "a"}\n{"text": "b"}\n',
    "array": b'\xef\xbb\xbf [{"text": "a"}, {"text": "b"}]\n',
    "nothing": b"[]",
}


@pytest.mark.parametrize("name", JSON)
def test_json_is_an_array_or_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(JSON[name])
    found = [record["text"] for record, _ in json_records(path, 1 << 20)]
    assert found == ([] if name == "nothing" else ["a", "b"])


def test_a_record_longer_than_a_block_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * (1 << 19)}, {"text": "y"}]))
    assert [len(record["text"]) for record, _ in json_records(path, 1 << 20)] == [1 << 19, 1]
    with pytest.raises(UserError, match=r"a\.json: record 1 is not valid JSON, or larger than"):
        list(json_records(path, 1 << 17))


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xA5 for b in data[middle : middle + 64]) + data[middle + 64 :]


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut gzip": (".jsonl.gz", lambda data: data[:-5], r"ends at byte \d+ in the middle of its gz"),
    "gzip": (".jsonl.gz", damaged, r"damaged gz data at or before byte \d+"),
    "no gzip": (".jsonl.gz", lambda data: b"text", "damaged gz data at or before byte 4"),
    "cut zstd": (
        ".jsonl.zst",
        lambda data: data[:-5],
        r"ends at byte \d+ in the middle",
    ),
    "no zstd": (".jsonl.zst", lambda data: b"text", "damaged zst data at or before byte 4"),
    "cut json": (".json", lambda data: data[:-20], "record 300 is not valid JSON"),
    "cut parquet": (".parquet", lambda data: data[:-20], "damaged parquet data in row group 0"),
    "bad line": (".jsonl.gz", lambda data: data + gzip.compress(b"{\n"), ":301: not valid JSON"),
    "no field": (
        ".jsonl.zst",
        lambda data: zstandard.ZstdCompressor().compress(b'\n{"a": 1}\n'),
        ":2: expected an object with the text in field 'text', found the fields 'a'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, name: str) -> None:
    suffix, damage, message = BROKEN[name]
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, rows())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        texts(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", rows(3))
    with pytest.raises(UserError, match="has no field 'body', but title, text, n"):
        texts(tmp_path / "a.parquet", TextOf("body"))


def test_a_field_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", rows(3))
    with pytest.raises(UserError, match=r"record 1: expected an object .* found a int there"):
        texts(tmp_path / "a.parquet", TextOf("n"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_an_endless_line_ends_at_the_limit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    data = b"{}\n" + bytes(1 << 22)
    compress = gzip.compress if suffix.endswith("gz") else zstandard.ZstdCompressor().compress
    path.write_bytes(compress(data))
    with pytest.raises(UserError, match=r":2: a line of more than 1 MiB"):
        list(read_lines(path, 1 << 16, 1 << 20))


def test_a_record_beyond_the_limit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LINE_BYTES", 1 << 20)
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": "b" * (3 << 20)}])
    with pytest.raises(UserError, match="record 2 has a text of 3 MiB; at most 1 MiB"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_sizes_of_pages_are_those_in_their_headers(
    tmp_path: Path, compression: str, version: str, dictionary: bool
) -> None:
    """Plain pages hold a length of four bytes and the text of each row."""
    path = tmp_path / "a.parquet"
    text = [f"{n:05d}" + "x" * (n % 700) for n in range(3000)]
    settings: dict[str, Any] = {"data_page_size": 5000, "write_batch_size": 8}
    parquet.write_table(
        pyarrow.table({"n": range(3000), "text": pyarrow.array(text)}),
        path,
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
        **settings,
    )
    info = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    start = info.dictionary_page_offset if dictionary else info.data_page_offset
    with path.open("rb") as file:
        sizes = list(page_sizes(file, start, start + info.total_compressed_size))
    assert len(sizes) > 20 or dictionary
    content = sum(4 + len(each) for each in text)
    assert content <= sum(sizes) < 1.02 * content + 10_000
    assert sum(sizes) < info.total_uncompressed_size


def test_a_huge_page_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LINE_BYTES", 1 << 20)
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": "b" * (9 << 20)}])
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    message = r"a\.parquet: row group 0 has a page of 9 MiB in 'text', .* at most 4 MiB"
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "a.parquet")


@given(data=st.binary(max_size=60))
@example(data=b"\x19\xf1" + b"\x80" * 9 + b"\x01")  # a list of 2^63 booleans
@example(data=b"\x19\xf7" + b"\x80" * 9 + b"\x01")  # and of as many doubles
def test_a_damaged_header_of_a_page_ends_the_search(data: bytes) -> None:
    assert len(list(page_sizes(io.BytesIO(data), 0, len(data)))) <= len(data)


def test_a_template_without_fields_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[".jsonl"](tmp_path / "a.jsonl", rows(3))
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--template", "text"]
    assert main(arguments) == 2
    assert "--template 'text': names no field" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "package"), [(".parquet", "pyarrow"), (".jsonl.zst", "zstandard")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", rows(3))
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'jepa_dist\[data\]'"):
        texts(tmp_path / f"a{suffix}")
