"""A full disk loses records, but does not end the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_file_loader

from jepa_dist.monitor.events import Appendable
from jepa_dist.monitor.run_dir import RunStatus, read_status, write_run_dir
from jepa_dist.monitor.writer import MetricsWriter
from tests.support.commands import TRAIN, Command
from tests.support.tiny import tiny_overrides, write_corpus


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill the file system completely."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096) == 4096:
                pass
        except OSError:
            pass
    return filler


def test_a_record_is_written_whole_or_not_at_all(small_disk: Path) -> None:
    file = Appendable(small_disk / "log")
    file.append(b"first\n")
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        any(file.append(b"y" * 3000) for _ in range(3))
    whole = (small_disk / "log").stat().st_size
    assert (whole - len("first\n")) % 3000 == 0
    filler.unlink()
    file.append(b"last\n")
    assert (small_disk / "log").stat().st_size == whole + len("last\n")


def test_a_full_disk_is_reported_once(small_disk: Path) -> None:
    warnings: list[str] = []
    writer = MetricsWriter(small_disk, warn=warnings.append)
    writer.write({"step": 1, "loss": 1.0})
    filler = fill(small_disk)
    for step in range(2, 200):  # the last pages of both files have some space left
        writer.write({"step": step, "loss": 2.0, "note": "x" * 200})
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    filler.unlink()
    writer.write({"step": 200, "loss": 3.0})
    writer.close()
    assert len(warnings) == 2
    assert "written again" in warnings[1]
    lines = [json.loads(x) for x in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["step"], lines[-1]["step"]) == (1, 200)
    assert len(lines) < 200
    (path,) = (small_disk / "tensorboard").iterdir()
    steps = [event.step for event in event_file_loader.LegacyEventFileLoader(str(path)).Load()]
    assert (steps[-1], sorted(steps[3:])) == (200, steps[3:])


def test_an_unwritable_file_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file stands where the run directory should")
    warnings: list[str] = []
    writer = MetricsWriter(tmp_path / "run", warn=warnings.append)
    for step in (1, 2):
        writer.write({"step": step, "loss": 1.0})
    writer.text("note", "text")
    writer.summary({"step": 2, "val/loss": 1.0}, {"seed": 0})
    writer.close()
    assert len(warnings) == 1


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def test_a_moved_file_is_created_again(tmp_path: Path) -> None:
    warnings: list[str] = []
    metrics, kept = tmp_path / "run/metrics.jsonl", tmp_path / "run/kept.jsonl"
    writer = MetricsWriter(metrics.parent, warn=warnings.append)
    writer.write({"step": 1, "loss": 1.0})
    metrics.rename(kept)
    writer.write({"step": 2, "loss": 1.0})
    metrics.unlink()
    metrics.mkdir()
    for step in (3, 4):
        writer.write({"step": step, "loss": 1.0})
    assert len(warnings) == 1
    assert warnings[0].startswith("metrics cannot be written (")
    metrics.rmdir()
    writer.write({"step": 5, "loss": 1.0})
    assert warnings[1:] == ["metrics are written again; 2 entries are missing"]
    writer.close()
    assert (steps_in(kept), steps_in(metrics)) == ([1], [5])


def test_a_moved_run_directory_is_reported_and_not_created_again(tmp_path: Path) -> None:
    warnings: list[str] = []
    writer = MetricsWriter(tmp_path / "run", warn=warnings.append)
    writer.write({"step": 1, "loss": 1.0})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for step in (2, 3):
        writer.write({"step": step, "loss": 1.0})
    assert len(warnings) == 1
    assert f"(No such file or directory: {tmp_path / 'run'}" in warnings[0]
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    writer.write({"step": 4, "loss": 1.0})
    writer.close()
    assert steps_in(tmp_path / "run/metrics.jsonl") == [1, 4]


def test_tensorboard_s_folder_is_created_again(tmp_path: Path) -> None:
    board = tmp_path / "run" / "tensorboard"
    writer = MetricsWriter(board.parent)
    writer.write({"step": 1, "loss": 1.0})
    shutil.rmtree(board)
    writer.write({"step": 2, "loss": 1.0})
    writer.close()
    (path,) = board.iterdir()
    version, purge, event = event_file_loader.LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert (purge.step, event.step) == (1, 2)


def test_the_status_needs_the_run_directory_alone(tmp_path: Path) -> None:
    warnings: list[str] = []
    run = tmp_path / "run"
    write_run_dir(run, {})
    status = RunStatus(run, warnings.append)
    (run / "logs").rmdir()
    (run / "logs").write_text("a file")
    status.update(state="running", step=1)
    assert read_status(run)["step"] == 1
    shutil.rmtree(run)
    for step in (2, 3):
        status.update(step=step)
    assert len(warnings) == 1
    assert f"(No such file or directory: {run}" in warnings[0]
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_continues_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """A real run whose disk is full temporarily; stopped when there is space for a checkpoint."""
    write_corpus(tmp_path)
    config = tmp_path / "config.yaml"
    config.touch()
    run = small_disk / "run"
    changes = {"run__dir": run, "train__steps": 100_000, "checkpoint__every": 0}
    with Command([*TRAIN, config, *tiny_overrides(tmp_path, **changes)]) as command:

        def steps() -> int:
            return command.output().count("\nstep ")

        command.wait_for(lambda: steps() >= 2, timeout=200)
        filler = fill(small_disk)
        command.wait_for(lambda: "metrics cannot be written" in command.output(), timeout=100)
        reached = steps()
        command.wait_for(lambda: steps() >= reached + 5, timeout=100)
        filler.unlink()
        command.wait_for(lambda: "metrics are written again" in command.output(), timeout=100)
        command.signal(signal.SIGTERM)
        done = command.wait(200)
    assert done.code == 0, done.output
    assert done.output.count("metrics cannot be written") == 1
    assert "Traceback" not in done.output
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert logged == sorted(set(logged))
    assert logged[-1] > len(logged) >= 2  # with a gap, and up to the end
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
