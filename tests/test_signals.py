"""A request to stop that arrives twice is one request; a second one ends the process at once."""

from __future__ import annotations

import signal
import sys
import time

from tests.commands import Command

PROGRAM = """
import time
from jepa_dist.signals import StopRequest

request = StopRequest(grace_seconds=60)
print("ready", flush=True)
while request.received is None:
    time.sleep(0.01)
print(f"received {request.received.name}", flush=True)
time.sleep(50)
"""


def test_echoes_are_not_second_requests() -> None:
    with Command([sys.executable, "-c", PROGRAM]) as process:
        process.wait_for(lambda: "ready" in process.output(), 60)
        # As SLURM to every process of the step, and torchrun to its ranks. (Of equal ones that are
        # pending at the same time only one arrives.)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM):
            process.signal(number)
        process.wait_for(lambda: "received SIG" in process.output(), 30)
        time.sleep(2.5)
        process.signal(signal.SIGTERM)
        assert process.wait(30).code == 128 + signal.SIGTERM


def test_what_nohup_ignores_is_not_a_request() -> None:
    with Command(["nohup", sys.executable, "-c", PROGRAM]) as process:
        process.wait_for(lambda: "ready" in process.output(), 60)
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)
        process.wait_for(lambda: "received" in process.output(), 30)
        assert "received SIGTERM" in process.output()
