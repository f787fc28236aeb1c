"""Safetensors files read without mapping them: equal to the library's, and never a bus error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jepa_dist.checkpoint.manifest import read_manifest, verify
from jepa_dist.checkpoint.shard_file import ShardFiles, assemble
from jepa_dist.errors import UserError
from jepa_dist.interop.tensor_file import DTYPES, TensorFile
from tests.support.crafted import SHARDS, body_of, make_checkpoint, seal


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4, 3, generator=generator) * 9
    named = {str(dtype): values.to(dtype) for dtype in DTYPES}
    return {**named, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    saved = tensors()
    save_file(saved, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.signatures().keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(file.read(name), tensor)
            assert file.read(name).dtype == tensor.dtype
        box = (slice(1, 4), slice(0, 2), slice(2, 3))
        assert torch.equal(file.read("torch.bfloat16", box), saved["torch.bfloat16"][box])
        assert file.read("empty", (slice(0, 0), slice(0, 4))).shape == (0, 4)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000])
def test_a_file_truncated_while_in_use_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    with TensorFile(path) as file:
        os.truncate(path, size)
        with pytest.raises(UserError) as caught:
            file.read("w")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: damaged")
    assert "truncated while in use" in problem
    with pytest.raises(UserError, match=r"x\.safetensors: damaged"):
        TensorFile(path)


def test_a_chunk_truncated_while_in_use_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    entry = read_manifest(path).tensors["model/matrix"]
    with ShardFiles(path) as files:
        assemble(files, "model/matrix", entry)
        os.truncate(path / SHARDS[1], 9)
        with pytest.raises(UserError, match=SHARDS[1] + ".*truncated while in use"):
            assemble(files, "model/matrix", entry)


def write_header(path: Path, header: bytes, data: int = 44, length: int | None = None) -> None:
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(data))


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "header"),
        (b"[]", "header"),
        (b'{"w": {"dtype": "F32", "shape": [11]}}', "data_offsets"),
        (b'{"w": {"dtype": "F32", "shape": [11], "data_offsets": [0, 40]}}', "44 bytes"),
        (b'{"w": {"dtype": "F32", "shape": [10], "data_offsets": [4, 44]}}', "from 0"),
        (b'{"w": {"dtype": "F4", "shape": [11], "data_offsets": [0, 44]}}', "F4"),
        (b'{"w": {"dtype": "F32", "shape": [-11], "data_offsets": [0, 44]}}', "shape"),
        (b'{"w": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}', "file holds 44"),
        (
            b'{"w": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 44]}}',
            "",
        ),
        (b'{"w": ' + b"[" * 100_000, "header"),
        (b'{"a\x00\xff": 1}', "header"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path: Path, header: bytes, word: str) -> None:
    write_header(tmp_path / "x.safetensors", header)
    with pytest.raises(UserError) as caught:
        TensorFile(tmp_path / "x.safetensors")
    (problem,) = caught.value.problems
    assert "x.safetensors: damaged" in problem
    assert word in problem


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_headers_of_any_length_are_not_allocated(tmp_path: Path, length: int) -> None:
    write_header(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(UserError, match="does not fit into"):
        TensorFile(tmp_path / "x.safetensors")


def drop_a_tensor(body: dict[str, Any]) -> None:
    del body["tensors"]["model/vector"]


def rename_a_tensor(body: dict[str, Any]) -> None:
    body["tensors"]["model/other"] = body["tensors"].pop("model/vector")


def reshape_a_tensor(body: dict[str, Any]) -> None:
    body["tensors"]["model/vector"]["shape"] = [1, 5]
    body["tensors"]["model/vector"]["chunks"][0].update(shape=[1, 5], offset=[0, 0])


def change_a_dtype(body: dict[str, Any]) -> None:
    body["tensors"]["model/vector"]["dtype"] = "F16"


@pytest.mark.parametrize(
    "change", [drop_a_tensor, rename_a_tensor, reshape_a_tensor, change_a_dtype]
)
def test_verify_compares_headers_with_the_manifest(tmp_path: Path, change: Any) -> None:
    path = make_checkpoint(tmp_path)
    assert verify(path) == []
    body = body_of(path)
    change(body)
    seal(path, body)
    problems = verify(path)
    assert problems
    assert all(p.startswith(f"{path / SHARDS[0]}: damaged: model/") for p in problems), problems
