"""What all command lines have in common."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import NoReturn

from jepa_dist.errors import UserError

_ROOT = __name__.partition(".")[0]
_GUARD = re.compile(r"^if __name__ == \"__main__\":", re.MULTILINE)


class Parser(argparse.ArgumentParser):
    """Reports mistakes as everything else does: one line, once."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: always.
        """
        raise UserError(f"command line: {message}; --help shows how to call it")


def program(module: str) -> str:
    """Return how the running command was called: ``jepa_dist train`` or ``python -m MODULE``."""
    called = sys.argv[0]
    return called if called.startswith(f"{_ROOT} ") else f"python -m {module}"


def refuse_module_without_command() -> None:
    """End the process with exit code 2 if ``python -m`` names a module that is no command.

    Python would import such a module and end with exit code 0, without a word. Called while the
    package is imported, which is before the module that ``-m`` names.
    """
    if sys.argv[:1] != ["-m"]:  # what it is while Python looks for the module
        return
    name = sys.orig_argv[-len(sys.argv)].rpartition("-m")[2].removesuffix(".__main__")
    if name != _ROOT and not name.startswith(f"{_ROOT}."):
        return
    commands = list_commands()
    if name not in commands and _exists(name):
        print(
            f"error: python -m {name}: this module is no command; commands are "
            f"{', '.join(commands)}",
            file=sys.stderr,
        )
        sys.exit(2)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # Python says which
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
