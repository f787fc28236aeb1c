"""Raises in the watchdog thread of the rank named in the file CHAOS_THREAD_FAILS, once it exists.

Python imports this module at its start when its folder is on the path.
"""

import os
import socket
import threading

_real_gethostname = socket.gethostname


def _gethostname() -> str:
    if threading.current_thread().name == "watchdog" and _is_named():
        raise RuntimeError("a deliberate failure")
    return _real_gethostname()


def _is_named() -> bool:
    try:
        with open(os.environ["CHAOS_THREAD_FAILS"], encoding="ascii") as file:
            return file.read() == os.environ.get("RANK")
    except FileNotFoundError:
        return False


socket.gethostname = _gethostname
