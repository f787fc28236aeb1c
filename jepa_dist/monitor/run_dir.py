"""The run directory: made once, never overwritten."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from jepa_dist.errors import UserError


def create_run_dir(path: Path, files: Mapping[str, str]) -> None:
    """Make the directory and write what defines the run into it (file name -> text).

    Raises:
        UserError: it holds something already, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"run.dir={path}: exists already and is not overwritten; "
            "name another one (run.dir=...) or move it away"
        )
    try:
        (path / "logs").mkdir(parents=True)
        for name, text in files.items():
            (path / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir={path}: cannot be written: {error.strerror}; name another one (run.dir=...)"
        ) from None


def log_to_run_dir(path: Path, rank: int) -> None:
    """Send this rank's log messages to ``logs/rank_<r>.log``, which exists only if it has any."""
    handler = logging.FileHandler(path / "logs" / f"rank_{rank}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("jepa_dist").addHandler(handler)
