"""Report what a call does to the machine, from Python's audit events.

Files that C++ and Rust libraries open by themselves raise no events.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tiny import REPOSITORY

_STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system")
_TALKS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
_ALWAYS = {*_STARTS, *_TALKS, "pickle.find_class"}
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_INSTALLED = {*sysconfig.get_paths().values(), *site.getsitepackages(), sys.prefix, sys.base_prefix}
# Of the kernel, and of libraries as they are imported.
_SYSTEM = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")


def watched(call: Callable[[], object], folder: Path) -> Callable[[], None]:
    """Return ``call`` that prints what it does besides work in ``folder``; for ``run_limited``.

    A line each: code that is not installed is run, a program is started, a socket used, a pickle
    with a class read, a file elsewhere is opened or changed. The hook stays until the process ends.
    """
    inside = (str(folder), str(folder.resolve()))
    readable = (*inside, *_SYSTEM, *_INSTALLED, str(REPOSITORY), *filter(None, sys.path))

    def is_within(path: Any, places: tuple[str, ...]) -> bool:
        if isinstance(path, int):
            return True
        absolute = os.path.abspath(os.fsdecode(path))
        if os.path.basename(absolute).startswith("torchinductor_"):  # made by importing torch
            return True
        return any(absolute == place or absolute.startswith(f"{place}/") for place in places)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[0] is not None:
            path, mode, flags = arguments
            is_write = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
            is_write |= any(letter in str(mode or "") for letter in "wax+")
            if not is_within(path, inside if is_write else readable):
                print("opens", path, mode, flags)
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if not name.startswith("<") and not is_within(name, readable[2:]):
                print("runs", name)
        elif event in _ALWAYS or (event in _WRITES and not is_within(arguments[0], inside)):
            print(event, arguments)

    def run() -> None:
        sys.addaudithook(hook)
        call()

    return run
