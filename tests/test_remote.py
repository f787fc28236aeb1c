"""Shards and copies of checkpoints behind URLs, on fsspec's memory, and on an S3 server."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from jepa_dist.checkpoint import RetentionPolicy, verify
from jepa_dist.checkpoint.folder import published
from jepa_dist.checkpoint.manifest import MANIFEST
from jepa_dist.checkpoint.mirror import Mirror, fetch_newest
from jepa_dist.config import Config
from jepa_dist.data.remote_shards import fetch_shards
from jepa_dist.data.shards import find_shards, read_shard, write_shard
from jepa_dist.errors import UserError
from jepa_dist.remote import open_remote
from tests.support.forked import run_module
from tests.support.patience import patience, wait_until
from tests.support.ranks import run_ranks
from tests.support.runs import train_resumable
from tests.support.tiny import tiny_config, tiny_overrides, write_corpus
from tests.support.trained_run import noisy_model, save_checkpoint

KEEP = RetentionPolicy(last=2)


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's files in memory, which all tests of a process share."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetch_shards.cache_clear()
    return tmp_path / "cache/jepa_dist/shards"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 2, 4 and 6."""
    config = tiny_config(tmp_path)
    model = noisy_model(config)
    for step in (2, 4, 6):
        save_checkpoint(tmp_path / "run", step, config, model, model)
    return tmp_path / "run/checkpoints"


# ---------------------------------------------------------------------------- shards


def upload_shards(filesystem: Any, folder: str, tmp_path: Path, seed: int = 0) -> list[bytes]:
    generator = np.random.Generator(np.random.PCG64(seed))
    contents = []
    for name in ("train_0.bin", "train_1.bin", "val_0.bin"):
        write_shard(tmp_path / name, generator.integers(0, 60, 500).astype(np.uint16))
        contents.append((tmp_path / name).read_bytes())
        filesystem.pipe_file(f"{folder}/{name}", contents[-1])
    return contents


def test_shards_are_copied_once(memory: Any, tmp_path: Path, cache: Path) -> None:
    contents = upload_shards(memory, "/data", tmp_path)
    memory.pipe_file("/data/meta.json", b"{}")
    memory.pipe_file("/data/other.txt", b"not asked for")
    found = find_shards("memory://data/train_*.bin", "data.train")
    assert [path.name for path in found] == ["train_0.bin", "train_1.bin"]
    assert [path.read_bytes() for path in found] == contents[:2]
    assert sorted(path.name for path in found[0].parent.iterdir() if path.suffix != ".lock") == [
        *(".index.json", ".lock", "meta.json", "train_0.bin", "train_1.bin")
    ]
    before = [path.stat().st_ino for path in found]
    fetch_shards.cache_clear()  # as another process
    assert [path.stat().st_ino for path in find_shards("memory://data/train_*.bin", "x")] == before


def test_changed_or_missing_shards_are_copied_again(memory: Any, tmp_path: Path) -> None:
    upload_shards(memory, "/data", tmp_path)
    first, second = find_shards("memory://data/train_*.bin", "data.train")
    contents = upload_shards(memory, "/data", tmp_path, seed=1)
    second.write_bytes(b"cut short")
    (first.parent / ".train_0.bin.aa.partial").write_bytes(b"of a process that was killed")
    fetch_shards.cache_clear()
    found = find_shards("memory://data/train_*.bin", "data.train")
    assert [path.read_bytes() for path in found] == contents[:2]
    assert not list(first.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory://data/none_*.bin", "no token shard matches there"),
        ("ftp://host/train_*.bin", "expected a path or one of"),
        ("zip://*.bin::memory://data/a.zip", "expected a path or one of"),
        ("gs://bucket/train_*.bin", "needs the package gcsfs; pip install gcsfs"),
    ],
)
def test_unusable_urls(memory: Any, url: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        find_shards(url, "data.train")
    (line,) = caught.value.problems
    assert line.startswith(f"data.train={url!r}: ")
    assert problem in line


def test_passwords_are_not_printed() -> None:
    with pytest.raises(UserError) as caught:
        open_remote("ftp://me:secret@host/a", "data.train")
    assert "secret" not in str(caught.value)


def test_names_do_not_lead_out_of_the_cache(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/data/..bin", b"")
    with pytest.raises(UserError, match="is not a valid shard name"):
        find_shards("memory://data/*bin", "data.train")


def test_an_interrupted_copy_is_named(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_shards(memory, "/data", tmp_path)

    def breaks_off(self: Any, path: str, *args: Any, **options: Any) -> Any:
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(type(memory), "_open", breaks_off)
    with pytest.raises(UserError, match=r"cannot read /data/train_0\.bin: .*connection lost"):
        find_shards("memory://data/train_*.bin", "data.train")


# ---------------------------------------------------------------------------- checkpoints


def upload(url: str, *paths: Path) -> list[str]:
    mirror = Mirror(url, KEEP)
    for path in paths:
        mirror.submit(path)
        wait_until(lambda: mirror._waiting is None, 20)
    mirror.close(patience(20))
    return mirror.take_messages()


def test_a_copy_is_the_checkpoint(memory: Any, run: Path, tmp_path: Path) -> None:
    steps = published(run)
    messages = upload("memory://copies/run", *steps.values())
    assert [line.rpartition(": ")[2] for line in messages] == [
        f"step_{step:08d} uploaded" for step in (2, 4, 6)
    ]
    left = sorted(name.rpartition("/")[2] for name in memory.ls("/copies/run", detail=False))
    assert left == ["step_00000004", "step_00000006"]
    (line,) = fetch_newest("memory://copies/run", tmp_path / "empty/checkpoints")
    assert "step_00000006 copied to" in line
    copy = tmp_path / "empty/checkpoints/step_00000006"
    assert verify(copy) == []
    for file in steps[6].iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    assert fetch_newest("memory://copies/run", tmp_path / "empty/checkpoints") == []


def test_a_checkpoint_may_be_deleted_while_it_is_uploaded(
    memory: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that has waited too long is skipped in favor of a newer one."""
    go, write = threading.Event(), type(memory)._open

    def slow(self: Any, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        if mode == "wb":
            assert go.wait(patience(60))
        return write(self, path, mode, *args, **options)

    monkeypatch.setattr(type(memory), "_open", slow)
    steps = published(run)
    mirror = Mirror("memory://slow", KEEP)
    mirror.submit(steps[2])
    wait_until(lambda: mirror._waiting is None, 20)
    mirror.submit(steps[4])
    mirror.submit(steps[6])  # returns immediately, whatever the service does
    shutil.rmtree(steps[2])
    go.set()
    mirror.close(patience(20))
    assert [line.rpartition(": ")[2] for line in mirror.take_messages()] == [
        "step_00000002 uploaded",
        "step_00000006 uploaded",
    ]
    fetch_newest("memory://slow", tmp_path / "empty")
    assert verify(tmp_path / "empty/step_00000006") == []


def test_an_upload_that_fails_leaves_no_manifest_and_is_reported(
    memory: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = published(run)
    upload("memory://copies", steps[2])
    with monkeypatch.context() as patch:
        write = type(memory)._open

        def fails(self: Any, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
            if mode == "wb" and path.endswith(".safetensors") and "00000004" in path:
                raise PermissionError("quota exceeded")
            return write(self, path, mode, *args, **options)

        patch.setattr(type(memory), "_open", fails)
        (line,) = upload("memory://copies", steps[4])
    assert "step_00000004 was not uploaded" in line
    assert "quota exceeded" in line
    assert not memory.exists(f"/copies/step_00000004/{MANIFEST}")
    (line,) = fetch_newest("memory://copies", tmp_path / "empty")
    assert "step_00000002 copied" in line
    upload("memory://copies", steps[4])
    assert memory.exists(f"/copies/step_00000004/{MANIFEST}")


def test_a_damaged_copy_is_reported_and_skipped(memory: Any, run: Path, tmp_path: Path) -> None:
    steps = published(run)
    upload("memory://copies", steps[2], steps[4])
    (file, *_) = json.loads((steps[4] / MANIFEST).read_text())["files"]
    damaged = bytearray(memory.cat_file(f"/copies/step_00000004/{file}"))
    damaged[-1] ^= 1
    memory.pipe_file(f"/copies/step_00000004/{file}", bytes(damaged))
    first, second = fetch_newest("memory://copies", tmp_path / "empty")
    assert "step_00000004 is damaged" in first
    assert "step_00000002 copied" in second
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["step_00000002"]


def test_copies_of_rolled_back_steps_are_deleted(memory: Any, run: Path) -> None:
    steps = published(run)
    upload("memory://copies", steps[6])
    upload("memory://copies", steps[2])
    assert [name.rpartition("/")[2] for name in memory.ls("/copies", detail=False)] == [
        "step_00000002"
    ]


# ---------------------------------------------------------------------------- a run


def train_with_cache(rank: int, world_size: int, config: Config, folder: str) -> Any:
    os.environ["XDG_CACHE_HOME"] = folder  # the server that forks ranks has that of its start
    return train_resumable(rank, world_size, config)


def test_a_run_resumes_from_the_copy_bit_for_bit(tmp_path: Path) -> None:
    """On an empty disk, with shards that it has to copy again."""
    write_corpus(tmp_path / "source")
    source = f"file://{tmp_path}/source"
    changes = {"data__train": f"{source}/train_*.bin", "data__val": f"{source}/val_*.bin"}
    changes |= {"train__steps": 8, "checkpoint__every": 4, "data__workers": 0}
    whole = tiny_config(tmp_path, run__dir=tmp_path / "whole", **changes)
    (expected,) = run_ranks(train_with_cache, 1, whole, str(tmp_path / "cache"))
    upload(f"file://{tmp_path}/copies", tmp_path / "whole/checkpoints/step_00000004")
    mirror = {"checkpoint__mirror": f"file://{tmp_path}/copies"}
    resumed = tiny_config(tmp_path, **changes, **mirror)
    (found,) = run_ranks(train_with_cache, 1, resumed, str(tmp_path / "other cache"))
    assert "step_00000004 copied to" in found["start"].messages[0]
    assert found["start"].step == 4
    for name, tensor in expected["state"].items():
        assert tensor.equal(found["state"][name]), name


def test_a_start_uploads_what_an_earlier_one_did_not(tmp_path: Path) -> None:
    """Also if the run is finished."""
    write_corpus(tmp_path)
    (tmp_path / "config.yaml").touch()
    changes = {"train__steps": 2, "run__dir": tmp_path / "run"}
    words = [tmp_path / "config.yaml", *tiny_overrides(tmp_path, **changes)]
    assert run_module("jepa_dist.train", *words).code == 0
    copies = f"file://{tmp_path}/copies"
    again = run_module("jepa_dist.train", *words, f"checkpoint.mirror={copies}")
    assert again.code == 0, again.output
    assert "finished already" in again.output
    assert "step_00000002 uploaded" in again.output
    assert verify(tmp_path / "copies/step_00000002") == []
    last = run_module("jepa_dist.train", *words, f"checkpoint.mirror={copies}")
    assert "uploaded" not in last.output


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a real S3 server in this process."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_on_an_s3_server(bucket: str, run: Path, tmp_path: Path) -> None:
    contents = upload_shards(fsspec.filesystem("s3"), f"{bucket}/data", tmp_path)
    found = find_shards(f"{bucket}/data/train_*.bin", "data.train")
    assert [path.read_bytes() for path in found] == contents[:2]
    assert read_shard(found[0]).max() < 60
    messages = upload(f"{bucket}/copies", *published(run).values())
    assert len(messages) == 3, messages
    (line,) = fetch_newest(f"{bucket}/copies", tmp_path / "empty")
    assert "step_00000006 copied" in line
    assert verify(tmp_path / "empty/step_00000006") == []
    (line,) = fetch_newest("s3://no-such-bucket-here/run", tmp_path / "other")
    assert line.endswith("holds no checkpoint")
