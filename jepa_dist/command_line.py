"""Argument parser, error handling and module checks shared by all commands."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from jepa_dist.errors import UserError

_ROOT = __name__.partition(".")[0]
_GUARD = re.compile(r"^if __name__ == \"__main__\":", re.MULTILINE)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a one-line ``UserError``."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: always.
        """
        raise UserError(f"command line: {message}; --help shows the usage")


# Limits that unusual input may exceed anywhere in the code, with a description of each.
_LIMITS: dict[type[Exception], str] = {
    OverflowError: "a number is too large",
    RecursionError: "something is nested too deeply",
    MemoryError: "there is not enough memory",
}
UNFORESEEN: tuple[type[Exception], ...] = (OSError, *_LIMITS)


@contextmanager
def end_with_reader() -> Iterator[None]:
    """Exit quietly, as other programs do, if the reader of the output has exited (``| head``)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(128 + signal.SIGPIPE)


def _has_no_reader() -> bool:
    """Return whether the output is a pipe that nobody reads."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in output.poll(0))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn errors from limits of the system and of Python into one-line problems.

    For the entry points: a file name that is too long, a number that does not fit, text nested too
    deeply. The line names the place in the code, since the input at fault is not known there.

    Raises:
        UserError: for OSError, OverflowError, RecursionError and MemoryError.
    """
    try:
        with end_with_reader():
            yield
    except OSError as error:
        name = str(error.filename or "the system")
        name = name if len(name) < 200 else f"{name[:90]}...{name[-90:]}"
        raise UserError(f"{name}: {error.strerror or error}") from error
    except tuple(_LIMITS) as error:
        what = next(words for kind, words in _LIMITS.items() if isinstance(error, kind))
        detail = f": {error}" if str(error) else ""
        raise UserError(
            f"{what} ({type(error).__name__}{detail}, in {_place_of(error)}); look for such a "
            "value in the command line and in the files that it names"
        ) from error


def _place_of(error: BaseException) -> str:
    """Return the innermost line of this package in the error's traceback, as module:line."""
    root = Path(__file__).parent
    place = "the command"
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root) and path != Path(__file__):
            place = f"{path.relative_to(root.parent)}:{line}"
    return place


def program(module: str) -> str:
    """Return how the running command was called: ``jepa_dist train`` or ``python -m MODULE``."""
    called = sys.argv[0]
    return called if called.startswith(f"{_ROOT} ") else f"python -m {module}"


def refuse_module_without_command() -> None:
    """Exit with code 2 if ``python -m`` names a module that is not a command.

    Python would import such a module and exit with code 0, without any output. Called while the
    package is imported, which happens before the module that ``-m`` names is.
    """
    if sys.argv[:1] != ["-m"]:  # its value while Python locates the module
        return
    name = sys.orig_argv[-len(sys.argv)].rpartition("-m")[2].removesuffix(".__main__")
    if name != _ROOT and not name.startswith(f"{_ROOT}."):
        return
    commands = list_commands()
    if name not in commands and _exists(name):
        print(
            f"error: python -m {name}: this module is not a command; commands are "
            f"{', '.join(commands)}",
            file=sys.stderr,
        )
        sys.exit(2)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # Python itself reports which module is missing
        return False


def list_commands() -> list[str]:
    """Return the names of all modules of the package that ``python -m`` can run."""
    root = Path(__file__).parent
    names = []
    for path in sorted(root.rglob("*.py")):
        if _GUARD.search(path.read_text(encoding="utf-8")):
            parts = (root.name, *path.relative_to(root).with_suffix("").parts)
            names.append(".".join(part for part in parts if part != "__main__"))
    return sorted(names)
