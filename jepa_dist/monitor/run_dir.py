"""The run directory."""

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
from jepa_dist.output import report_lost_output
from jepa_dist.run_lock import is_in_use

# Far more than a run writes.
_SMALL_FILE_BYTES = 64 * MIB
_SMALL_FILES = ("config.yaml", "data.json", "status.json", "starts.jsonl")
_LARGE_FILES = (
    "metrics.jsonl",
    *("model.safetensors", "model.json", "ema.safetensors", "ema.json"),
)
_FOLDERS = ("checkpoints", "heartbeats", "logs", "tensorboard")
_CHECKPOINT = re.compile(r"step_(\d{8,})")


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


class RunStatus:
    """``status.json``: how the run stands at this moment, for scripts; kept by rank 0.

    Rewritten whole at every record and every checkpoint. The checkpoint is looked up in the run
    directory, so that it is true whoever saved it.

    Args:
        run_dir: The run.
        warn: Tells the user, once, that the file cannot be written; training goes on.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._warn = warn
        self._is_failing = False
        self._facts: dict[str, Any] = {}

    def update(self, **facts: Any) -> None:
        """Change some of ``state`` (``running``, ``finished``, ``stopped``, ``failed``), ``step``
        (optimizer steps done), ``reason`` (why it ended, in words), ``phase`` and
        ``tokens_per_second``, and write the file."""
        self._facts |= facts
        try:
            _write_status(self._run_dir, self._facts)
            self._is_failing = False
        except UserError as error:  # of no consequence for what is trained
            if not self._is_failing:
                self._warn(f"status.json is not up to date: {error}")
            self._is_failing = True


def _write_status(run_dir: Path, facts: Mapping[str, Any]) -> None:
    checkpoint = newest_checkpoint(run_dir)
    saved = checkpoint is not None and checkpoint == facts["step"]
    status = {**facts, "checkpoint": checkpoint, "saved": saved, "updated": time.time()}
    write_run_dir(run_dir, {"status.json": json.dumps(status) + "\n"})


def newest_checkpoint(run_dir: Path) -> int | None:
    """Return the step of the newest published checkpoint; None if there is none."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return None
    steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return max(steps, default=None)


def note_failure(path: Path, rank: int, reason: str) -> None:
    """Let ``status.json`` say that the run failed, unless another rank has said so already."""
    status = read_status(path)
    if status.get("state") == "running":
        _write_status(path, {**status, "state": "failed", "reason": f"rank {rank}: {reason}"})


def current_status(path: Path) -> dict[str, Any]:
    """Return ``read_status``, corrected for a run that could not write its end (``kill -9``).

    Such a run says ``running`` for ever: its lock and heartbeats say that it is dead, its
    checkpoints what is saved. Its state is ``killed``.
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
        "reason": "it ended without a word: killed, or its host went down",
    }


def read_status(path: Path) -> dict[str, Any]:
    """Return what a run last wrote about itself; nothing if there is none, or it is damaged."""
    try:
        status = read_json(path / "status.json", _SMALL_FILE_BYTES)
    except (OSError, ValueError):
        return {}
    is_status = isinstance(status, dict) and type(status.get("step")) is int
    return status if is_status else {}


class _LogFile(logging.FileHandler):
    """A log file that drops what it cannot write: a full disk must not end the training."""

    def _open(self) -> io.TextIOWrapper:
        """Open it for appending; a FIFO in its place would wait for a reader.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        file = open_to_append(Path(self.baseFilename))
        return io.TextIOWrapper(
            io.BufferedWriter(file), encoding=self.encoding, errors=self.errors, write_through=True
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; the file is opened by the first."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: standard error may be what cannot be written."""


def log_to_run_dir(path: Path, rank: int) -> None:
    """Send this rank's log messages to ``logs/rank_<r>.log``, which exists only if it has any."""
    file = path / "logs" / f"rank_{rank}.log"
    handler = _LogFile(file, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("jepa_dist").addHandler(handler)
    report_lost_output()
