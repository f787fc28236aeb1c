"""The run directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError
from jepa_dist.files import MIB, check_regular, read_json, write_atomically

# Far more than a run writes.
_SMALL_FILE_BYTES = 64 * MIB
_SMALL_FILES = ("config.yaml", "data.json", "status.json", "starts.jsonl")
_LARGE_FILES = ("metrics.jsonl",)
_FOLDERS = ("checkpoints", "heartbeats", "logs", "tensorboard")


def write_run_dir(path: Path, files: Mapping[str, str]) -> None:
    """Make the directory if need be and write what defines the run into it (file name -> text).

    Raises:
        UserError: it cannot be written.
    """
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(path / name, text)
    except OSError as error:
        raise UserError(
            f"run.dir={path}: cannot be written: {error.strerror}; name another one (run.dir=...)"
        ) from None


def check_run_dir(path: Path) -> None:
    """See that the run directory can be made and written; leaves nothing new behind.

    Raises:
        UserError: it cannot be.
    """
    made = path
    while not made.exists():
        made = made.parent
    if not made.is_dir() or not os.access(made, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir={path}: cannot be written ({made} is not a folder this user may write to); "
            "name another one (run.dir=...)"
        )


def check_run_files(path: Path) -> None:
    """See that what the run directory holds are files and folders where a run has them, so that no
    rank waits for a FIFO or reads a device later on.

    Raises:
        UserError: something else is there; one line each.
    """
    problems = []
    for name in (*_SMALL_FILES, *_LARGE_FILES):
        try:
            check_regular(path / name, _SMALL_FILE_BYTES if name in _SMALL_FILES else None)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path / name}: {error.strerror}")
    problems += [
        f"{path / name}: not a folder"
        for name in _FOLDERS
        if os.path.lexists(path / name) and not (path / name).is_dir()
    ]
    if problems:
        raise UserError(*(f"{p}; move it away, or name another run.dir" for p in problems))


def write_status(path: Path, state: str, step: int, *, saved: bool, reason: str) -> None:
    """Leave ``status.json``: how the run stands, for scripts (torchrun's exit code does not say).

    Args:
        path: Run directory.
        state: ``running``, ``finished``, ``stopped`` or ``failed``.
        step: Optimiser steps done.
        saved: Whether a checkpoint holds them.
        reason: Why it ended, in words.

    Raises:
        UserError: it cannot be written.
    """
    status = {"state": state, "step": step, "saved": saved, "reason": reason}
    write_run_dir(path, {"status.json": json.dumps(status) + "\n"})


def note_failure(path: Path, rank: int, reason: str) -> None:
    """Let ``status.json`` say that the run failed, unless another rank has said so already."""
    status = read_status(path)
    if status.get("state") == "running":
        reason = f"rank {rank}: {reason}"
        step, saved = status.get("step", 0), bool(status.get("saved"))
        write_status(path, "failed", step, saved=saved, reason=reason)


def read_status(path: Path) -> dict[str, Any]:
    """What ``write_status`` left; nothing if there is none, or it is damaged."""
    try:
        status = read_json(path / "status.json", _SMALL_FILE_BYTES)
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def log_to_run_dir(path: Path, rank: int) -> None:
    """Send this rank's log messages to ``logs/rank_<r>.log``, which exists only if it has any."""
    handler = logging.FileHandler(path / "logs" / f"rank_{rank}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("jepa_dist").addHandler(handler)
