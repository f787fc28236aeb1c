"""``python -m jepa_dist.bench monitor``: both runs are measured, interleaved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.forked import run_module

BENCH = (sys.executable, "-m", "jepa_dist.bench", "monitor")
SMALL = ("parallel.compile=false", "batch.sequences=2", "batch.micro=2", "model.seq_len=32")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_runs_are_interleaved(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--rounds", 3, "--steps", 2, "--json", path, "--set", *SMALL)
    done = run_command(*BENCH, *options, "train.log_every=1", "monitor.jepa_every=2", timeout=300)
    assert done.code == 0, done.output
    result = json.loads(path.read_text())
    for clock in ("wall", "processor"):
        assert len(result[clock]["ratios"]) == 3
        assert result[clock]["off"] > 0
        assert 0.01 < result[clock]["ratio"] < 100
    assert "| processor |" in done.output


def test_rounds_and_steps_must_be_positive() -> None:
    done = run_module("jepa_dist.bench", "monitor", "--rounds", 0)
    assert done.code == 2
    assert "--rounds and --steps must be at least 1" in done.output
