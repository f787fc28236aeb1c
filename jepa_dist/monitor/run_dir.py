"""The run directory: creation, checks, ``status.json`` and log files."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError
from jepa_dist.files import MIB, check_regular, open_to_append, read_json, write_atomically
from jepa_dist.process.output import report_lost_output
from jepa_dist.run.lock import is_in_use

# Much more than a run writes.
_SMALL_FILE_BYTES = 64 * MIB
_SMALL_FILES = ("config.yaml", "data.json", "status.json", "starts.jsonl")
_LARGE_FILES = (
    "metrics.jsonl",
    *("model.safetensors", "model.json", "ema.safetensors", "ema.json"),
)
_FOLDERS = ("checkpoints", "heartbeats", "logs", "tensorboard")
_CHECKPOINT = re.compile(r"step_(\d{8,})")


def write_run_dir(path: Path, files: Mapping[str, str]) -> None:
    """Create the directory if it is missing, and write ``files`` (name -> text) into it.

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
    """Check that the run directory can be created and written, without creating anything.

    Raises:
        UserError: it cannot.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir={path}: cannot be written ({existing} is not a folder this user may write "
            "to); name another one (run.dir=...)"
        )


def check_run_files(path: Path) -> None:
    """Check that the entries of the run directory are regular files and folders, so that no rank
    later waits for a FIFO or reads a device.

    Raises:
        UserError: one line for each entry of another kind.
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


class RunStatus:
    """``status.json``: the current status of the run, for scripts; written by rank 0.

    Rewritten at every record and every checkpoint. The newest checkpoint is looked up in the run
    directory.

    Args:
        run_dir: The run.
        warn: Called once if the file cannot be written; training continues.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._warn = warn
        self._is_failing = False
        self._facts: dict[str, Any] = {}

    def update(self, **facts: Any) -> None:
        """Update fields and write the file: ``state`` (``running``, ``finished``, ``stopped``,
        ``failed``), ``step`` (completed optimizer steps), ``reason`` (why it ended), ``phase``,
        ``tokens_per_second``."""
        self._facts |= facts
        try:
            _write_status(self._run_dir, self._facts)
            self._is_failing = False
        except OSError as error:  # must not end training
            if not self._is_failing:
                place = error.filename or self._run_dir
                self._warn(f"status.json is not up to date ({error.strerror}: {place})")
            self._is_failing = True


def _write_status(run_dir: Path, facts: Mapping[str, Any]) -> None:
    checkpoint = newest_checkpoint(run_dir)
    saved = checkpoint is not None and checkpoint == facts["step"]
    status = {**facts, "checkpoint": checkpoint, "saved": saved, "updated": time.time()}
    write_atomically(run_dir / "status.json", json.dumps(status) + "\n")


def newest_checkpoint(run_dir: Path) -> int | None:
    """Return the step of the newest published checkpoint; None if there is none."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return None
    steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return max(steps, default=None)


def record_failure(path: Path, rank: int, reason: str) -> None:
    """Record in ``status.json`` that the run failed, unless another rank has done so already."""
    status = read_status(path)
    if status.get("state") == "running":
        _write_status(path, {**status, "state": "failed", "reason": f"rank {rank}: {reason}"})


def current_status(path: Path) -> dict[str, Any]:
    """Return ``read_status``, corrected for a run that was killed (``kill -9``).

    The file of such a run still says ``running``, but its lock shows that it is dead. The returned
    state is ``killed``, and the checkpoint is the newest one on disk.
    """
    status = read_status(path)
    if status.get("state") != "running" or is_in_use(path) is not False:
        return status
    checkpoint = newest_checkpoint(path)
    return {
        **status,
        "state": "killed",
        "checkpoint": checkpoint,
        "saved": checkpoint is not None and checkpoint == status.get("step"),
        "reason": "it exited without a message: killed, or its host went down",
    }


def read_status(path: Path) -> dict[str, Any]:
    """Return the contents of ``status.json``; empty if it is missing or damaged."""
    try:
        status = read_json(path / "status.json", _SMALL_FILE_BYTES)
    except (OSError, ValueError):
        return {}
    is_status = isinstance(status, dict) and type(status.get("step")) is int
    return status if is_status else {}


class _LogFile(logging.FileHandler):
    """A log file that drops what it cannot write: a full disk must not end the training."""

    def _open(self) -> io.TextIOWrapper:
        """Open the file for appending, without blocking if it is a FIFO.

        Raises:
            OSError: it cannot be opened, or is not a regular file.
        """
        path = Path(self.baseFilename)
        path.parent.mkdir(exist_ok=True)  # it may have been removed, but not the run directory
        file = open_to_append(path)
        return io.TextIOWrapper(
            io.BufferedWriter(file), encoding=self.encoding, errors=self.errors, write_through=True
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; the first one opens the file."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore the error: standard error may not be writable either."""


def log_to_run_dir(path: Path, rank: int) -> None:
    """Send this rank's log messages to ``logs/rank_<r>.log``, which exists only if it has any."""
    file = path / "logs" / f"rank_{rank}.log"
    handler = _LogFile(file, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("jepa_dist").addHandler(handler)
    report_lost_output()
