"""Make all ranks exit when one has exited, even those that wait for it inside a collective.

gloo detects a closed connection; NCCL keeps waiting. torchrun sends the remaining ranks a stop
signal and kills them only after its time limit (30 s, or as long as a save may take), so each of
them must find out that the signal means a lost rank, not a request to save and stop:

* on the same host: count torchrun's child processes when a stop signal arrives;
* on other hosts: a rank that fails, or that detects a missing one, writes a report to
  ``RUN/heartbeats/``, which every rank's watchdog checks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil

EXIT_LOST_RANK = 1

# Time for the main thread to raise a more specific error by itself.
_GRACE_SECONDS = 3.0


class Peers:
    """The other ranks of this start of the run.

    Args:
        run_dir: Holds ``heartbeats/``, on a file system that all hosts share.
        rank: This rank.
        start_id: The same on all ranks, different for every start, so that reports of earlier
            starts are ignored.
    """

    def __init__(self, run_dir: Path, rank: int, start_id: str) -> None:
        self._report = run_dir / "heartbeats" / f"failed_{start_id}.json"
        self._rank = rank
        self._is_leaving = False

    def report_failure(self, reason: str, rank: int | None = None) -> None:
        """Report that a rank (this one by default) has failed; only the first report is kept."""
        rank = self._rank if rank is None else rank
        partial = self._report.with_suffix(f".{self._rank}.partial")
        report = {"rank": rank, "host": socket.gethostname(), "reason": reason}
        with suppress(OSError):  # without a report, torchrun terminates the others
            self._report.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(report), encoding="utf-8")
            if not self._report.exists():
                partial.replace(self._report)
            partial.unlink(missing_ok=True)

    def leave_if_reported(self) -> None:
        """Exit this process soon if another rank has reported a failure."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads(self._report.read_text(encoding="utf-8"))
            if report["rank"] != self._rank:
                self._leave_soon(f"rank {report['rank']} on {report['host']}: {report['reason']}")

    def leave_if_local_rank_ended(self) -> None:
        """Exit this process soon if a rank of this host has exited. Call when asked to stop."""
        ended = ended_local_ranks()
        if ended:
            self.report_failure("exited", ended[0])
            self._leave_soon(f"rank {ended[0]} on {socket.gethostname()} has exited")

    def remove_old_reports(self) -> None:
        """Delete the reports of earlier starts; call on one rank."""
        for path in self._report.parent.glob("failed_*"):
            if path != self._report:
                path.unlink(missing_ok=True)

    def _leave_soon(self, why: str) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            timer = threading.Timer(_GRACE_SECONDS, self._leave, [why])
            timer.daemon = True
            timer.start()

    def _leave(self, why: str) -> None:
        print(
            f"[rank {self._rank}] error: {why}; exiting without waiting for it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST_RANK)


def ended_local_ranks() -> list[int]:
    """Return the ranks of this host, as numbered by torchrun, whose processes have exited.

    Empty if the launcher is not the parent of all ranks of the host.
    """
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in os.environ for name in names):
        return []
    rank, local_rank, count = (int(os.environ[name]) for name in names)
    alive = set()
    for process in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error, OSError, KeyError, ValueError):  # a zombie, most likely
            alive.add(int(process.environ()["RANK"]))
    if rank not in alive:
        return []
    first = rank - local_rank
    return [other for other in range(first, first + count) if other not in alive]
