"""Configurations and sweeps shipped with the package, found by name from any folder."""

from __future__ import annotations

import re
from pathlib import Path

from jepa_dist.errors import UserError

_CONFIGS = Path(__file__).parent / "configs"
_SWEEPS = _CONFIGS / "sweeps"
_OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_0-9]+)*=")


def find_config(name: str | Path) -> Path:
    """Return the path of a configuration file, or of a shipped one by its name.

    Args:
        name: A path, or the name of a shipped file: ``debug``, ``debug.yaml`` or
            ``configs/debug.yaml``. A file that exists takes precedence.

    Raises:
        UserError: no such file, and ``name`` is not a path.
    """
    return _find(name, _CONFIGS, "configs")


def find_sweep(name: str | Path) -> Path:
    """Return the path of a sweep file, or of a shipped one, as ``find_config`` does.

    Raises:
        UserError: no such file, and ``name`` is not a path.
    """
    return _find(name, _SWEEPS, "configs/sweeps")


def _find(name: str | Path, folder: Path, prefix: str) -> Path:
    path = Path(name)
    if "\0" in str(path) or (path.exists() and not path.is_dir()):
        return path
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if _OVERRIDE.match(str(path)) and path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"command line: {path}: expected a YAML file or one of {', '.join(shipped)} first, "
            f"then KEY=VALUE; e.g. {next(iter(shipped))} {path}"
        )
    for stem, file in shipped.items():
        if str(path) in (stem, file.name, f"{prefix}/{file.name}"):
            return file
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path  # opening it raises an error that names it
    raise UserError(
        f"{path}: no such file, and no shipped configuration has this name; expected "
        f"a YAML file or one of {', '.join(shipped)}"
    )
