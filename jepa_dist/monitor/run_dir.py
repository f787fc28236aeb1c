"""The run directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError


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


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Leave ``status.json``: how the run ended, for scripts (torchrun's exit code does not say)."""
    write_run_dir(path, {"status.json": json.dumps(status) + "\n"})


def log_to_run_dir(path: Path, rank: int) -> None:
    """Send this rank's log messages to ``logs/rank_<r>.log``, which exists only if it has any."""
    handler = logging.FileHandler(path / "logs" / f"rank_{rank}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("jepa_dist").addHandler(handler)
