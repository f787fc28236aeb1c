"""The run directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError
from jepa_dist.output import report_lost_output


def write_run_dir(path: Path, files: Mapping[str, str]) -> None:
    """Make the directory if need be and write what defines the run into it (file name -> text).

    Raises:
        UserError: it cannot be written.
    """
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            partial = path / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(path / name)
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
        write_status(path, "failed", status["step"], saved=status["saved"], reason=reason)


def read_status(path: Path) -> dict[str, Any]:
    """What ``write_status`` left; nothing if there is none, or it is damaged."""
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


class _LogFile(logging.FileHandler):
    """A log file that drops what it cannot write: a full disk must not end the training."""

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
