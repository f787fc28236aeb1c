"""Who is stuck, and where: heartbeats in the run directory, and stacks when one is late.

Every rank rewrites ``heartbeats/rank_<r>.json`` every few seconds. A hung rank soon holds up all
others, so nobody reads these files until its own place has not changed for ``late_seconds``: then
it looks who is behind (or gives no sign of life at all), logs it, and dumps its own stacks. This
only tells; what ends the wait is the time limit of the collectives (parallel.timeout_seconds).
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
from jepa_dist.monitor.meter import Place

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0
# Two looks at the files, this many beats apart, tell who is alive.
_BEATS_BETWEEN_LOOKS = 3
_JOIN_SECONDS = 5.0


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Heartbeat:
    """What a rank leaves."""

    beat: int
    count: int
    step: int
    phase: str
    seconds: float
    """That it has been in this place."""
    host: str
    pid: int


_HEARTBEAT = TypeAdapter(Heartbeat)


class Watchdog:
    """Leaves this rank's heartbeat and tells who holds the run up. Runs inside a ``with`` block.

    Args:
        run_dir: Holds ``heartbeats/`` and ``logs/``.
        rank: This rank.
        world_size: Number of ranks.
        place: Where this rank is, at any time.
        late_seconds: In one place for longer than this is late; 0 watches nothing.
        look: Called at every beat, by the watching thread.
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
        self._is_told = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._late_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)  # a file system that hangs keeps it

    def _run(self) -> None:
        self._tick()
        while not self._end.wait(self._interval):
            self._tick()

    def _tick(self) -> None:
        self._look()
        place = self._place()
        if place != self._seen:
            self._seen, self._since, self._is_told = place, time.monotonic(), False
        seconds = time.monotonic() - self._since
        self._leave_heartbeat(seconds)
        if seconds > self._late_seconds and not self._is_told:
            self._is_told = True
            self._tell(seconds)

    def _leave_heartbeat(self, seconds: float) -> None:
        self._beat += 1
        beat = Heartbeat(
            beat=self._beat,
            **asdict(self._seen),
            seconds=round(seconds, 1),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        with suppress(OSError):  # a full disk must not end the watch
            self._folder.mkdir(exist_ok=True)
            text = json.dumps(asdict(beat))
            write_atomically(self._folder / f"rank_{self._rank}.json", text)

    def _tell(self, seconds: float) -> None:
        before = read_heartbeats(self._folder, self._world_size)
        for _ in range(_BEATS_BETWEEN_LOOKS):
            if self._end.wait(self._interval):
                return
            self._look()
            self._leave_heartbeat(time.monotonic() - self._since)
        if self._place() != self._seen:
            return  # it went on meanwhile
        after = read_heartbeats(self._folder, self._world_size)
        lines = diagnose(before, after, self._world_size)
        text = f"no progress for {seconds:.0f} s: " + "; ".join(lines)
        log.warning("%s", text)
        if self._rank == min(_alive(before, after), default=self._rank):
            print(f"warning: {text} (stacks: {self._stacks.parent})", file=sys.stderr, flush=True)
        with suppress(OSError), open_to_append(self._stacks) as file:
            faulthandler.dump_traceback(file, all_threads=True)


def read_heartbeats(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """The last heartbeat of every rank that has left a readable one, by rank."""
    beats = {}
    for rank in range(world_size):
        with suppress(OSError, ValueError):  # pydantic's error is a ValueError
            beat = read_bytes(folder / f"rank_{rank}.json", MIB)
            beats[rank] = _HEARTBEAT.validate_json(beat)
    return beats


def diagnose(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], world_size: int
) -> list[str]:
    """Name the ranks that hold the run up, one line each.

    Args:
        before: Heartbeats by rank.
        after: The same, some beats later.
        world_size: Number of ranks.
    """
    alive = _alive(before, after)
    lines = [f"rank {r} has left no heartbeat" for r in range(world_size) if r not in after]
    lines += [
        f"{_who(rank, beat)} gives no sign of life, last seen {_where(beat)}"
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
    """Ranks that beat between the two looks, or that came between them."""
    return {
        rank
        for rank, beat in after.items()
        if rank not in before or (beat.beat, beat.pid) != (before[rank].beat, before[rank].pid)
    }


def _who(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} (host {beat.host}, pid {beat.pid})"


def _where(beat: Heartbeat) -> str:
    return f"at step {beat.step} in {beat.phase}"
