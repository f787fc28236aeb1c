"""The arguments of the training command, and what its run logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.commands import TORCHRUN
from tests.support.tiny import tiny_overrides

UNDER_TORCHRUN = (*TORCHRUN, "-m", "jepa_dist.train")


def settings(folder: Path, **changes: Any) -> list[str]:
    """Return CONFIG KEY=VALUE ... of the tiny recipe on the corpus in ``folder``."""
    config = folder / "config.yaml"
    config.touch()
    return [str(config), *tiny_overrides(folder, **changes)]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run that has ended."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def has_logged(run_dir: Path) -> bool:
    """Return whether the run has written two records."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= 2


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON Lines file; [] if it does not exist yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(run_dir: Path) -> int:
    """Return the last recorded step; 0 before the first."""
    lines = json_lines(run_dir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0
