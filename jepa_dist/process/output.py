"""Standard output and error that never raise, and write no control codes to a terminal.

They tolerate a closed pipe, a full disk and an ASCII terminal. Text that a run prints may come from
others' files (names, text samples); a terminal would execute the escape sequences in it.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from typing import TextIO

log = logging.getLogger(__name__)

# All control characters of ASCII and Latin-1 but tab, line feed and carriage return (of the bar).
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def keep_output_alive() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` drop what cannot be written, instead of raising.

    Descriptors 0 to 2 that are closed are opened on /dev/null: the next file that the process
    opens would get their number, and what libraries print would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(name, stream))


def report_lost_output() -> None:
    """Log output lost before the log file existed; later losses are logged when they occur."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LossyStream):
            stream.report()


def escape_controls(text: str) -> str:
    """Return ``text`` with control characters as escapes, such as ``\\x1b``."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class LossyStream(io.TextIOBase):
    """A line-buffered text stream over a file descriptor that drops what cannot be written.

    Control characters, and those that its encoding does not have, are written as escapes. The first
    loss is logged.
    """

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self._name = name
        self._descriptor = 1 if name == "stdout" else 2
        self._stream = stream
        self._encoding = "utf-8"
        self._pending = ""
        self._lock = threading.RLock()
        self._is_reported = False
        self.lost: OSError | None = None
        """Why the first line was lost; None if none was."""
        if stream is not None:
            try:
                self._descriptor = stream.fileno()
                self._encoding = stream.encoding or "utf-8"
                stream.flush()
            except (OSError, ValueError) as error:
                self.lost = error if isinstance(error, OSError) else None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the stream had it."""
        return self._encoding

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Write complete lines, buffer the rest; never raises OSError."""
        with self._lock:
            self._pending += escape_controls(text)
            if "\n" in text or "\r" in text:
                self.flush()
        return len(text)

    def flush(self) -> None:
        """Write the pending text; drop it if that fails."""
        with self._lock:
            data = self._pending.encode(self._encoding, errors="backslashreplace")
            self._pending = ""
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if self.lost is None:
                    self.lost = error
                    self.report()

    def report(self) -> None:
        """Log the first loss, once."""
        if self.lost is not None and not self._is_reported and _has_log_file():
            self._is_reported = True
            log.warning("%s cannot be written (%s): lines are lost", self._name, self.lost)


def _has_log_file() -> bool:
    handlers = logging.getLogger("jepa_dist").handlers
    return any(isinstance(handler, logging.FileHandler) for handler in handlers)
