"""Signals that ask a run to stop: noted here, acted on by all ranks together through the plan."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. Installs handlers; a second signal exits at once.

    The handler only sets a flag: the step is finished, a checkpoint saved, and every rank stops at
    the same step, because rank 0 puts it into the plan (contract C2).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
