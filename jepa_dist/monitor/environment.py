"""The environment of a run: versions, host, devices, environment variables, git commit."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

_GIT_SECONDS = 5.0
# Recorded besides all JEPA_*. GROUP_WORLD_SIZE is torchrun's number of agents, i.e. hosts.
_VARIABLES = {
    *("GROUP_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"),
}


def environment(world_size: int) -> dict[str, str]:
    """Return what a run's numbers depend on besides its configuration, by name."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "host of rank 0": socket.gethostname(),
        "ranks": str(world_size),
        **_cuda(),
        **{name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }
    return found | git_state(Path(__file__).parent)


def git_state(folder: Path) -> dict[str, str]:
    """Return the commit of the checkout around ``folder`` and the files changed since; empty
    outside a checkout or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = (_git(folder, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    return {"commit": commit.strip(), "changed since": _listed([line[3:] for line in changed])}


def as_lines(facts: Mapping[str, str]) -> str:
    """Return one line per fact, with aligned values."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _matters(variable: str) -> bool:
    return variable.startswith("JEPA_") or variable in _VARIABLES


def _listed(files: list[str]) -> str:
    shown = ", ".join(files[:10]) + ", ..." * (len(files) > 10)
    return f"{len(files)} files: {shown}" if files else "nothing"


def _cuda() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": "CPU"}
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16 reduced precision reduction": str(
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
