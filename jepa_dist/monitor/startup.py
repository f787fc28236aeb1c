"""Time of each part of a start, from process creation to the first step."""

from __future__ import annotations

import time

import psutil


class Startup:
    """Timer of the parts of a start; call ``done`` after each part."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Attribute the time since the previous call (or process creation) to ``part``."""
        now = time.time()
        # Not negative even if the clock is set back.
        self._parts[part] = max(0.0, now - self._last)
        self._last = now

    def record(self) -> dict[str, float]:
        """Return seconds by part and their sum, as metrics; empty from the second call on."""
        parts, self._parts = self._parts, {}
        if not parts:
            return {}
        seconds = {f"startup/{part}": value for part, value in parts.items()}
        return {**seconds, "startup/total": sum(parts.values())}
