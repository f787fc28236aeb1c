"""Where a run is, according to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Moment = Callable[[Path], bool]
"""Given a run directory, return whether the run is at this moment now."""


def last_record(run_dir: Path) -> dict[str, Any]:
    """Return the last complete record of a step in metrics.jsonl; {} without one."""
    with suppress(OSError):  # no such file, or not a regular one
        for line in reversed((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            with suppress(ValueError):
                record: dict[str, Any] = json.loads(line)
                if "final" not in record:
                    return record
    return {}


def heartbeat(run_dir: Path, rank: int) -> dict[str, Any]:
    """Return the last heartbeat of a rank; {} without one."""
    with suppress(OSError, ValueError):
        beat: dict[str, Any] = json.loads(
            (run_dir / "heartbeats" / f"rank_{rank}.json").read_text(encoding="utf-8")
        )
        return beat
    return {}


def staging(run_dir: Path) -> bool:
    """A save has begun, and no shard exists yet."""
    return any(not _names(folder, "shard_*") for folder in _staged(run_dir))


def writing(run_dir: Path) -> bool:
    """Shards are being written, or just have been."""
    return any(
        _names(folder, "shard_*") and not _names(folder, "manifest.json")
        for folder in _staged(run_dir)
    )


def before_rename(run_dir: Path) -> bool:
    """Everything is written; the folder is not renamed yet."""
    return any(_names(folder, "manifest.json") for folder in _staged(run_dir))


def between_rename_and_latest(run_dir: Path) -> bool:
    """The checkpoint is published, and ``latest`` does not name it."""
    return newest(run_dir) != _latest(run_dir)


SAVING: dict[str, Moment] = {
    "while it stages a checkpoint": staging,
    "while it writes a checkpoint": writing,
    "before the rename": before_rename,
    "between rename and latest": between_rename_and_latest,
}


def is_saving(run_dir: Path) -> bool:
    """Return whether the run is at any moment of ``SAVING``."""
    return any(moment(run_dir) for moment in SAVING.values())


def newest(run_dir: Path) -> str:
    """Return the name of the newest checkpoint; empty without one."""
    return max(_names(run_dir / "checkpoints", "step_*"), default="")


def _staged(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".staging-*"))


def _names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


def _latest(run_dir: Path) -> str:
    with suppress(FileNotFoundError):
        return (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return ""
