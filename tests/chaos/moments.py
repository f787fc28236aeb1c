"""Where a run is, as its files tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Moment = Callable[[Path], bool]
"""Whether a run, of which it gets the run directory, is there now."""


def last_record(run_dir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl that belongs to a step; nothing if there is none."""
    with suppress(OSError):  # there is none, or something else has its name
        for line in reversed((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            with suppress(ValueError):
                record: dict[str, Any] = json.loads(line)
                if "final" not in record:
                    return record
    return {}


def heartbeat(run_dir: Path, rank: int) -> dict[str, Any]:
    """Where a rank was a moment ago; nothing if it has not said so."""
    with suppress(OSError, ValueError):
        beat: dict[str, Any] = json.loads(
            (run_dir / "heartbeats" / f"rank_{rank}.json").read_text(encoding="utf-8")
        )
        return beat
    return {}


def staging(run_dir: Path) -> bool:
    """A save has begun, and no shard is there."""
    return any(not _names(folder, "shard_*") for folder in _staged(run_dir))


def writing(run_dir: Path) -> bool:
    """Shards are being written, or just have been."""
    return any(
        _names(folder, "shard_*") and not _names(folder, "manifest.json")
        for folder in _staged(run_dir)
    )


def before_rename(run_dir: Path) -> bool:
    """All is written but the name."""
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
    """At any of these."""
    return any(moment(run_dir) for moment in SAVING.values())


def newest(run_dir: Path) -> str:
    """Name of the newest checkpoint; empty if there is none."""
    return max(_names(run_dir / "checkpoints", "step_*"), default="")


def _staged(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".staging-*"))


def _names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


def _latest(run_dir: Path) -> str:
    with suppress(FileNotFoundError):
        return (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return ""
