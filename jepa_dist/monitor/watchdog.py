"""Hang detection: heartbeat files in the run directory, and stack dumps when a rank is stuck.

Every rank rewrites ``heartbeats/rank_<r>.json`` every few seconds. A hung rank soon blocks all
others, so a rank reads these files only when its own place has not changed for ``late_seconds``. It
then determines which ranks are behind (or send no heartbeat), logs it, and dumps its own stacks.
The watchdog only reports; the time limit of collectives (parallel.timeout_seconds) ends the run.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from jepa_dist.files import MIB, open_to_append, read_bytes, write_atomically
from jepa_dist.monitor.step_timer import Place

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0
# A rank is alive if its file changes between two reads, this many beats apart.
_BEATS_BETWEEN_READS = 3
_JOIN_SECONDS = 5.0


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Heartbeat:
    """Contents of a rank's heartbeat file."""

    beat: int
    count: int
    step: int
    phase: str
    seconds: float
    """Time since its place last changed."""
    host: str
    pid: int


_HEARTBEAT = TypeAdapter(Heartbeat)


class Watchdog:
    """Writer of this rank's heartbeat, and hang detector; a context manager.

    Args:
        run_dir: Holds ``heartbeats/`` and ``logs/``.
        rank: This rank.
        world_size: Number of ranks.
        place: Returns this rank's current place; called by the watchdog thread.
        late_seconds: Warn if the place has not changed for this long; 0 disables the watchdog.
        look: Called at every beat, by the watchdog thread.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        place: Callable[[], Place],
        late_seconds: float,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = run_dir / "heartbeats"
        self._stacks = run_dir / "logs" / f"rank_{rank}.log"
        self._rank, self._world_size = rank, world_size
        self._place = place
        self._late_seconds = late_seconds
        self._look = look
        self._interval = min(_BEAT_SECONDS, late_seconds / 4)
        self._beat = 0
        self._since = time.monotonic()
        self._seen = place()
        self._has_warned = False
        self._is_unwritable = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._late_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)  # with a time limit: the file system may hang

    def _run(self) -> None:
        self._tick()
        while not self._end.wait(self._interval):
            self._tick()

    def _tick(self) -> None:
        self._look()
        place = self._place()
        if place != self._seen:
            self._seen, self._since, self._has_warned = place, time.monotonic(), False
        seconds = time.monotonic() - self._since
        self._write_heartbeat(seconds)
        if seconds > self._late_seconds and not self._has_warned:
            self._has_warned = True
            self._report_hang(seconds)

    def _write_heartbeat(self, seconds: float) -> None:
        self._beat += 1
        beat = Heartbeat(
            beat=self._beat,
            **asdict(self._seen),
            seconds=round(seconds, 1),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        try:
            self._folder.mkdir(exist_ok=True)
            text = json.dumps(asdict(beat))
            write_atomically(self._folder / f"rank_{self._rank}.json", text)
            self._is_unwritable = False
        except OSError as error:  # a full disk must not end the watchdog
            self._report_unwritable(error)

    def _report_unwritable(self, error: OSError) -> None:
        """Warn once, until a heartbeat can be written again."""
        if self._is_unwritable:
            return
        self._is_unwritable = True
        text = (
            f"heartbeats cannot be written ({error.strerror}: {self._folder}): until they can be, "
            "a rank that hangs is not named, and a failure is not reported to other hosts"
        )
        log.warning("%s", text)
        if self._rank == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _report_hang(self, seconds: float) -> None:
        before = read_heartbeats(self._folder, self._world_size)
        for _ in range(_BEATS_BETWEEN_READS):
            if self._end.wait(self._interval):
                return
            self._look()
            self._write_heartbeat(time.monotonic() - self._since)
        if self._place() != self._seen:
            return  # there was progress in the meantime
        after = read_heartbeats(self._folder, self._world_size)
        lines = diagnose(before, after, self._world_size)
        text = f"no progress for {seconds:.0f} s: " + "; ".join(lines)
        log.warning("%s", text)
        if self._rank == min(_alive(before, after), default=self._rank):
            print(f"warning: {text} (stacks: {self._stacks.parent})", file=sys.stderr, flush=True)
        with suppress(OSError), open_to_append(self._stacks) as file:
            faulthandler.dump_traceback(file, all_threads=True)


def read_heartbeats(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """Return the last heartbeat of every rank that has a valid file, by rank."""
    beats = {}
    for rank in range(world_size):
        with suppress(OSError, ValueError):  # pydantic's error is a ValueError
            beat = read_bytes(folder / f"rank_{rank}.json", MIB)
            beats[rank] = _HEARTBEAT.validate_json(beat)
    return beats


def diagnose(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], world_size: int
) -> list[str]:
    """Return one line for each rank that blocks the run.

    Args:
        before: Heartbeats by rank.
        after: Heartbeats some beats later.
        world_size: Number of ranks.
    """
    alive = _alive(before, after)
    lines = [f"rank {r} has left no heartbeat" for r in range(world_size) if r not in after]
    lines += [
        f"{_who(rank, beat)} sends no heartbeat, last seen {_where(beat)}"
        for rank, beat in after.items()
        if rank not in alive
    ]
    counts = {after[rank].count for rank in alive}
    if len(counts) > 1:
        lines += [
            f"{_who(rank, after[rank])} is behind, {_where(after[rank])} for "
            f"{after[rank].seconds:.0f} s"
            for rank in sorted(alive)
            if after[rank].count == min(counts)
        ]
    elif alive and not lines:
        lines = [f"all ranks are {_where(after[min(alive)])}"]
    return lines


def _alive(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]) -> set[int]:
    """Return the ranks whose heartbeat changed, or appeared, between the two reads."""
    return {
        rank
        for rank, beat in after.items()
        if rank not in before or (beat.beat, beat.pid) != (before[rank].beat, before[rank].pid)
    }


def _who(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} (host {beat.host}, pid {beat.pid})"


def _where(beat: Heartbeat) -> str:
    return f"at step {beat.step} in {beat.phase}"
