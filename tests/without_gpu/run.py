"""Start this package's commands in the environment with the CUDA build; read their results."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.without_gpu import environment
from tests.without_gpu.table import Table

CONFIGS = tuple(sorted((environment.REPOSITORY / "configs").glob("*.yaml")))
_PROCESSES = min(4, os.cpu_count() or 1)


def compile_regions(configs: Sequence[Path] = CONFIGS, timeout: float = 3600.0) -> Table:
    """Compile the regions of these configurations; takes minutes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.json"
        _run(folder, timeout, "regions", out, *configs, "--processes", _PROCESSES)
        return Table.read(out)


def watch_step(config: str, *options: Any, timeout: float = 600.0) -> dict[str, Any]:
    """Return the result of ``step`` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        _run(folder, timeout, "step", out, config, *options)
        return _read(out)


def try_waits(timeout: float = 120.0) -> dict[str, dict[str, list[str]]]:
    """Return the result of ``waits`` on known waits."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "waits.json"
        _run(folder, timeout, "waits", out)
        return _read(out)


def _run(folder: str, timeout: float, module: str, *arguments: Any) -> None:
    """Run one of the commands; end all its processes if it takes too long.

    Raises:
        UnavailableError: there is no environment.
        RuntimeError: it fails.
        subprocess.TimeoutExpired: it takes too long.
    """
    python = environment.find()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JEPA_")}
    with subprocess.Popen(
        environment.command(python, module, *arguments),
        cwd=environment.REPOSITORY,
        env=kept | environment.variables(Path(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, 9)  # its workers, too
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(map(str, arguments))} failed:\n{output[-6000:]}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
