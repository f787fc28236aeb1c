"""The notebooks in examples/: every code cell runs, in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import REPOSITORY, tiny_config
from tests.support.trained_run import noisy_model, save_export


def test_the_notebook_that_uses_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny run in place of the debug run, and without Jupyter, which would start a process."""
    config = tiny_config(tmp_path)
    save_export(tmp_path / "runs/debug", 20, config, noisy_model(config))
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "examples/use_a_run.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    variables: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "use_a_run.ipynb", "exec"), variables)
    written = capsys.readouterr().out
    assert written.startswith("step 20, recurrence phase 2, on ")
    assert "def main(" in written
    assert written.count("cosine") == 3
    assert not any(cell.get("outputs") for cell in notebook["cells"])
