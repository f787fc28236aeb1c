"""Shifts this process's clock by the seconds in the file CHAOS_CLOCK_JUMP, once it exists.

Python imports this module at its start when its folder is on the path.
"""

import os
import time

_real_time = time.time
_real_time_ns = time.time_ns


def _jump() -> int:
    try:
        with open(os.environ["CHAOS_CLOCK_JUMP"], encoding="ascii") as file:
            return int(file.read() or 0)
    except FileNotFoundError:
        return 0


def _time() -> float:
    return _real_time() + _jump()


def _time_ns() -> int:
    return _real_time_ns() + _jump() * 10**9


time.time = _time
time.time_ns = _time_ns
