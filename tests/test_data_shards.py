from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from jepa_dist.data.shards import (
    Shard,
    ShardWriter,
    find_shards,
    fingerprint,
    read_count,
    read_shard,
    write_shard,
)
from jepa_dist.errors import UserError


def shard_bytes(tokens: list[int], magic: int = 20240520, version: int = 1) -> bytes:
    """Return a shard, from the description of the format."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def test_a_written_shard_is_the_format_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([0, 1, 258, 65535]))
    assert path.read_bytes() == shard_bytes([0, 1, 258, 65535])
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("tokens", [[], [7], list(range(300))])
def test_a_foreign_shard_is_read_unchanged(tmp_path: Path, tokens: list[int]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes(tokens))
    assert read_count(path) == len(tokens)
    assert read_shard(path).tolist() == tokens
    assert read_shard(path).dtype == np.uint16


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), ShardWriter(tmp_path / "a.bin") as writer:
        writer.write("not an array")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (shard_bytes([1, 2])[:1000], "1000 bytes are too few"),
        (shard_bytes([1, 2], magic=7), "expected magic 20240520 or 20240801, found 7"),
        (shard_bytes([1, 2], version=2), "version 2, expected 1"),
        (shard_bytes([1, 2])[:-1], r"promises 2 tokens \(1028 bytes\), the file has 1027"),
        (shard_bytes([1, 2]) + b"x", r"promises 2 tokens \(1028 bytes\), the file has 1029"),
        (struct.pack("<256i", 20240520, 1, -5, *[0] * 253), "promises -5 tokens"),
    ],
)
def test_a_damaged_shard_is_one_line_naming_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_shard(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "prepare the data again" in str(error.value)
    assert len(error.value.problems) == 1


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "no.bin"))):
        read_shard(tmp_path / "no.bin")


def test_find_shards_sorts_by_name(tmp_path: Path) -> None:
    for name in ("t_2.bin", "t_10.bin", "t_1.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub").mkdir()
    found = find_shards(str(tmp_path / "t_*.bin"), "data.train")
    assert [path.name for path in found] == ["t_1.bin", "t_10.bin", "t_2.bin"]


def test_an_empty_glob_names_the_key_the_pattern_and_the_fix(tmp_path: Path) -> None:
    pattern = str(tmp_path / "t_*.bin")
    with pytest.raises(UserError) as error:
        find_shards(pattern, "data.train")
    for part in ("data.train", pattern, "python -m jepa_dist.data.prepare"):
        assert part in str(error.value)


def wide_bytes(tokens: list[int]) -> bytes:
    """Return a shard of llm.c for Llama 3, from the description of the format."""
    header = struct.pack("<256i", 20240801, 7, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}I", *tokens)


class TestWideShards:
    @pytest.mark.parametrize("vocab_size", [65_537, 128_256])
    def test_ids_above_16_bits_are_the_format_of_llm_c(
        self, tmp_path: Path, vocab_size: int
    ) -> None:
        path = tmp_path / "a.bin"
        tokens = [0, 65_535, 65_536, vocab_size - 1]
        write_shard(path, np.array(tokens), vocab_size)
        assert path.read_bytes() == wide_bytes(tokens)
        assert read_shard(path).tolist() == tokens
        assert Shard(path).read(1, 3).tolist() == tokens[1:3]

    def test_a_damaged_one_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(wide_bytes([1, 2])[:-2])
        with pytest.raises(UserError, match=r"promises 2 tokens \(1032 bytes\), the file has 1030"):
            read_shard(path)

    @pytest.mark.parametrize(("ids", "vocab_size"), [([65_536], 65_536), ([-1], 70_000)])
    def test_an_id_that_does_not_fit_is_refused(
        self, tmp_path: Path, ids: list[int], vocab_size: int
    ) -> None:
        with pytest.raises(UserError, match="do not fit into"):
            write_shard(tmp_path / "a.bin", np.array(ids), vocab_size)
        assert list(tmp_path.iterdir()) == []

    def test_more_tokens_than_a_header_counts_are_refused(self, tmp_path: Path) -> None:
        many = np.broadcast_to(np.uint16(7), (2**31,))  # takes no memory
        with pytest.raises(UserError, match="2147483648 tokens are more than the int32"):
            write_shard(tmp_path / "a.bin", many)
        assert list(tmp_path.iterdir()) == []


class TestMegatron:
    def write(self, folder: Path, documents: list[list[int]], code: int, kind: str) -> Path:
        """Write a Megatron data set, from the description of the format."""
        width = np.dtype(kind).itemsize
        lengths = [len(document) for document in documents]
        starts = [width * sum(lengths[:i]) for i in range(len(lengths))]
        index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
        index += struct.pack(f"<{len(lengths)}i", *lengths)
        index += struct.pack(f"<{len(lengths)}q", *starts)
        index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
        (folder / "corpus.idx").write_bytes(index)
        path = folder / "corpus.bin"
        path.write_bytes(np.concatenate(documents).astype(kind).tobytes())
        return path

    @pytest.mark.parametrize(("code", "kind"), [(1, "u1"), (4, "<i4"), (8, "<u2")])
    def test_is_read_by_its_index(self, tmp_path: Path, code: int, kind: str) -> None:
        path = self.write(tmp_path, [[1, 2, 3], [200], list(range(90))], code, kind)
        assert read_shard(path).tolist() == [1, 2, 3, 200, *range(90)]
        assert fingerprint([path])["tokens"] == 94

    def test_float_ids_are_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [[1, 2]], 7, "<f4")
        with pytest.raises(UserError, match="version 1 and type 7"):
            read_shard(path)

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [[1, 2, 3], [4]], 4, "<i4")
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(UserError, match=r"corpus\.idx describes 16 bytes .*, the file has 12"):
            read_shard(path)

    def test_a_cut_index_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [[1, 2, 3], [4]], 4, "<i4")
        index = path.with_suffix(".idx")
        index.write_bytes(index.read_bytes()[:-1])
        with pytest.raises(UserError, match="expected 82 for 2 sequences"):
            read_shard(path)

    def test_an_index_named_as_a_shard_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [[1, 2, 3], [4]], 4, "<i4")
        with pytest.raises(UserError, match="an index of Megatron; name"):
            read_shard(path.with_suffix(".idx"))


class TestFingerprint:
    def test_of_narrow_shards_never_changes(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.bin", np.arange(50_000) % 257)
        assert fingerprint([tmp_path / "a.bin"])["digest"] == "5bd243d9ae685bbb2dfd32afa9fd36fe"

    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        for i in range(3):
            write_shard(tmp_path / f"{i}.bin", np.arange(50_000) % (200 + i))
        return sorted(tmp_path.iterdir())

    def test_is_plain_data_without_folders(self, paths: list[Path]) -> None:
        found = fingerprint(paths)
        assert json.loads(json.dumps(found)) == found == fingerprint(paths)
        assert str(paths[0].parent) not in json.dumps(found)
        assert found["tokens"] == 150_000
        assert [file["bytes"] for file in found["files"]] == [101_024] * 3

    @pytest.mark.parametrize("offset", [1024, 101_022, 1030])
    def test_sees_content(self, paths: list[Path], offset: int) -> None:
        before = fingerprint(paths)["digest"]
        content = bytearray(paths[1].read_bytes())
        content[offset] ^= 1
        paths[1].write_bytes(content)
        assert fingerprint(paths)["digest"] != before

    def test_sees_names_sizes_and_missing_files(self, paths: list[Path]) -> None:
        seen = {fingerprint(paths)["digest"], fingerprint(paths[:2])["digest"]}
        renamed = paths[0].rename(paths[0].with_name("x.bin"))
        seen.add(fingerprint([renamed, *paths[1:]])["digest"])
        write_shard(renamed, np.arange(50_001) % 200)
        seen.add(fingerprint([renamed, *paths[1:]])["digest"])
        assert len(seen) == 4

    def test_moving_the_folder_changes_nothing(self, paths: list[Path], tmp_path: Path) -> None:
        before = fingerprint(paths)
        (tmp_path / "elsewhere").mkdir()
        moved = [path.rename(tmp_path / "elsewhere" / path.name) for path in paths]
        assert fingerprint(moved) == before
