"""What a start costs, from the process's first breath to its first step."""

from __future__ import annotations

import time

import psutil


class Startup:
    """Splits the time since this process was started; call ``done`` after each part."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Everything since the part before (or the start of the process) was this one."""
        now = time.time()
        # Guards against a clock that is set meanwhile.
        self._parts[part] = max(0.0, now - self._last)
        self._last = now

    def record(self) -> dict[str, float]:
        """Seconds by part, and their sum, as metrics; once, and nothing afterwards."""
        parts, self._parts = self._parts, {}
        if not parts:
            return {}
        seconds = {f"startup/{part}": value for part, value in parts.items()}
        return {**seconds, "startup/total": sum(parts.values())}
