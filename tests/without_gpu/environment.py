"""The environment with a CUDA build of PyTorch, and how to install and find it.

``JEPA_CUDA_PYTHON`` names its Python; without it, the default folder of ``install`` is
used. No driver and no device are needed: two small libraries stand in for what PyTorch asks of
them (``shims``), compiled here with g++.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
VARIABLE = "JEPA_CUDA_PYTHON"
# The version of the committed table.
TORCH_VERSION = "2.11.0"
INSTALL_COMMAND = "python -m tests.without_gpu install"
_SHIMS = Path(__file__).with_name("shims")


class UnavailableError(Exception):
    """There is no such environment; the message has the reason and a fix."""


def default_folder() -> Path:
    """Return the default folder of the environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jepa_dist" / f"torch-{TORCH_VERSION}-cuda"


def install(folder: Path) -> Path:
    """Make the environment (some 4 GB are downloaded); return its Python.

    Raises:
        UnavailableError: it cannot be made.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    others = [need for need in project["dependencies"] if not need.startswith("torch>")]
    python = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", f"torch=={TORCH_VERSION}", *others],
    ):
        if subprocess.run(command, check=False).returncode != 0:
            raise UnavailableError(f"{folder}: failed: {' '.join(command)}")
    check(python)
    return python


def find() -> Path:
    """Return the Python of the environment.

    Raises:
        UnavailableError: no environment, or no compiler for the shims.
    """
    named = os.environ.get(VARIABLE)
    python = Path(named) if named else default_folder() / "bin" / "python"
    if not python.exists():
        where = f"{VARIABLE}={named}" if named else str(python)
        raise UnavailableError(
            f"{where}: no Python with a CUDA build of torch there; make one (4 GB) with "
            f"`{INSTALL_COMMAND}`, or name one with {VARIABLE}"
        )
    for tool in ("g++", "gcc"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"needs {tool} (on Debian: apt-get install g++)")
    check(python)
    return python


@functools.cache
def check(python: Path) -> str:
    """Return the version of the environment's torch.

    Raises:
        UnavailableError: it does not import, or is no CUDA build.
    """
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{python}: torch cannot be imported: {done.stderr[-300:].strip()}")
    version, cuda = done.stdout.split()
    if cuda == "None":
        raise UnavailableError(f"{python}: torch {version} is not a CUDA build")
    return version


def command(python: Path, module: str, *arguments: Any) -> list[str]:
    """Return the command line of one of this package's modules that need the environment."""
    return [str(python), "-m", f"tests.without_gpu.{module}", *map(str, arguments)]


def variables(folder: Path) -> dict[str, str]:
    """Compile the shims into ``folder``; return the environment variables of such a command."""
    driver, device_count = folder / "libcuda.so.1", folder / "device_count.so"
    for source, library, options in (
        ("libcuda.c", driver, ["gcc", f"-Wl,-soname,{driver.name}"]),
        ("device_count.cpp", device_count, ["g++"]),
    ):
        compiler, *flags = options
        subprocess.run(
            [compiler, "-shared", "-fPIC", *flags, "-o", library, _SHIMS / source], check=True
        )
    return {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": str(device_count),
        "DEVICE_COUNT_LIBRARY": str(device_count),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
