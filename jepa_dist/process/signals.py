"""Signals that ask a run to stop: recorded here, acted on by all ranks through the step plan."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from jepa_dist.process.dist_env import parent_death_signal, set_parent_death_signal
from jepa_dist.process.failure import call_with_limit

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
EXIT_GRACE_OVER = 4

# Sent by keys on a terminal; pressing one again requests an immediate exit. Other senders
# (schedulers, launchers) repeat signals, and use SIGKILL to force an exit.
_IMPATIENT = (signal.SIGINT, signal.SIGQUIT)

# They stay ignored if nohup (or a shell, for a background job) has set them to be ignored.
OF_TERMINALS = (signal.SIGHUP, signal.SIGQUIT)

# One request may arrive twice: SLURM signals every process of a step, and torchrun forwards signals
# to its ranks.
_ECHO_SECONDS = 2.0


class StopRequest:
    """Records whether this process was asked to stop; the constructor installs signal handlers.

    Later signals are ignored, except that a SIGINT or SIGQUIT more than two seconds after the first
    signal exits immediately (within two seconds it counts as a duplicate).

    All ranks finish the same step, save a checkpoint and stop, because rank 0 puts the stop into
    the step plan (one plan per step). A thread receives the signals: Python would not run a handler
    while the main thread waits in a collective, which is where a rank that must exit may be stuck.

    That thread also takes over the parent death signal (``die_with_launcher``), and clears it at
    the first stop signal: torchrun exits when it is asked to stop a second time, while its ranks
    are still saving.

    Args:
        grace_seconds: If the process still runs this long after the first signal, it exits (code
            4).
        on_stop: Called once, at the first signal, by the thread that receives it.
        on_give_up: Called with the reason, in one line, before that exit.
    """

    def __init__(
        self,
        grace_seconds: float,
        on_stop: Callable[[], None] | None = None,
        on_give_up: Callable[[str], None] | None = None,
    ) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._grace_seconds = grace_seconds
        self._on_stop = on_stop
        self._on_give_up = on_give_up
        self._inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        self._outbox = outbox  # keeps it open
        for number in STOP_SIGNALS:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (is_ignored and number in OF_TERMINALS):
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        is_listening = threading.Event()
        death_signal = parent_death_signal()
        threading.Thread(
            target=self._listen, args=(death_signal, is_listening), name="signals", daemon=True
        ).start()
        is_listening.wait()
        set_parent_death_signal(0)

    def _listen(self, death_signal: int, is_listening: threading.Event) -> None:
        set_parent_death_signal(death_signal)
        is_listening.set()
        while True:
            for number in self._inbox.recv(64):
                if number in STOP_SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is not None:
            if number in _IMPATIENT and now - self._received_at > _ECHO_SECONDS:
                os._exit(128 + number)
            return
        self.received, self._received_at = number, now
        set_parent_death_signal(0)
        timer = threading.Timer(self._grace_seconds, self._give_up, [number.name])
        timer.daemon = True
        timer.start()
        if self._on_stop is not None:
            self._on_stop()

    def _give_up(self, name: str) -> None:
        reason = (
            f"not stopped {self._grace_seconds:g} s after {name}: leaving without a checkpoint "
            "(checkpoint.grace_seconds)"
        )
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if self._on_give_up is not None:
            call_with_limit(self._on_give_up, reason)
        os._exit(EXIT_GRACE_OVER)
