"""Run a module's command in a process that has torch imported already.

Importing torch takes longer than most of these commands, and their output and exit code do not
depend on how the process was created. Tests of processes, signals, environments and launchers start
real commands (``tests.support.commands``).
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.commands import Finished, environment
from tests.support.patience import patience
from tests.support.ranks import fork_context
from tests.support.tiny import REPOSITORY


def run_module(
    module: str,
    *arguments: Any,
    timeout: float = 120,
    cwd: Path = REPOSITORY,
    environ: dict[str, Any] | None = None,
) -> Finished:
    """Run ``python -m MODULE ARGUMENTS`` to its end, on one rank, as ``run_command`` would.

    Raises:
        AssertionError: it takes longer than ``patience(timeout)`` seconds.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        variables = environment(environ or {})
        process = fork_context.Process(
            target=_run, args=(module, words, str(cwd), variables, output.name)
        )
        started = time.monotonic()
        process.start()
        process.join(patience(timeout))
        seconds = time.monotonic() - started
        is_late = process.exitcode is None
        if is_late:
            process.kill()
            process.join()
        text = output.read()
    assert not is_late, f"still running after {seconds:.0f} s:\n{text}"
    return Finished(process.exitcode, text, seconds)


def _run(
    module: str, arguments: list[str], cwd: str, variables: dict[str, str], output: str
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
