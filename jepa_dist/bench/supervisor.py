"""Run tasks in child processes, one per rank, so that a hang or crash affects one task only.

Every rank of the launcher runs a supervisor. Rank 0 enforces the time limits; the others follow its
decisions in the launcher's store. After a failure, the children of all ranks are killed and new
ones run the remaining tasks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.constants import default_pg_timeout

from jepa_dist.bench.child import Request, read_events
from jepa_dist.bench.parts import PARTS
from jepa_dist.bench.session import Measured, Settings, Task
from jepa_dist.parallel.meeting import launcher_store
from jepa_dist.process.dist_env import is_launched, launched_rank, launched_world_size

_START_SECONDS = 90.0  # to import torch and to join the process group
_FEWEST_SECONDS = 15.0  # a child with less time left is not started
_LEAVE_SECONDS = 30.0  # for a child to end after that of rank 0
_POLL_SECONDS = 0.1
_LOG_LINES = 60
NO_TIME = "no time left"


@dataclass(frozen=True)
class Outcome:
    """Result of a task."""

    task: Task
    status: str
    """``ok``, ``failed``, ``skipped`` or ``left out``."""
    seconds: float = 0.0
    reason: str = ""
    measured: Measured | None = None
    log: Sequence[str] = ()
    """The last lines of the process's output, if it failed."""


def meet() -> Store:
    """Return the store that the launcher's ranks share (a private one without a launcher)."""
    if not is_launched():
        return HashStore()
    return launcher_store(default_pg_timeout)


class Supervisor:
    """Supervisor of the child processes that measure tasks. Construction is collective.

    Args:
        store: Shared by the ranks.
        settings: The command's settings.
        folder: For data, checkpoints and logs.
        seconds: Time limit for all tasks together.
        patience: Factor on the parts' time limits.
        report: Called with every outcome, on rank 0.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        folder: Path,
        seconds: float,
        patience: float,
        report: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._folder = folder
        self._deadline = time.monotonic() + seconds
        self._patience = patience
        self._report = report
        self._rank, self._ranks = launched_rank(), launched_world_size()
        self._round = self._agreements = 0

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Measure the tasks in one process per rank, in a new one after each failure.

        Returns:
            The outcomes, on rank 0; an empty list on the others.
        """
        outcomes: list[Outcome] = []
        while tasks:
            found = self._run_round(list(tasks))
            outcomes += found
            done = {outcome.task for outcome in found}
            left = self._agree([task for task in tasks if task not in done])
            tasks = [Task(*task) for task in left]
        return outcomes

    # ------------------------------------------------------------------ one round

    def _run_round(self, tasks: list[Task]) -> list[Outcome]:
        """Start a child on every rank and wait until it has exited."""
        self._round += 1
        if not self._agree(time.monotonic() + _FEWEST_SECONDS < self._deadline):
            return self._left_out(tasks)
        own = self._folder / f"rank_{self._rank}"
        own.mkdir(parents=True, exist_ok=True)
        events = own / f"events_{self._round}.jsonl"
        log = own / f"log_{self._round}.txt"
        request = Request(tasks, self._settings, self._folder, events, f"bench/{self._round}")
        began = time.time()
        with log.open("wb") as output:
            child = _start(request, output.fileno())
            try:
                code = self._watch(child, events)
            finally:
                _end(child)
        return self._conclude(tasks, events, log, code, began)

    def _watch(self, child: subprocess.Popen[bytes], events: Path) -> int | None:
        """Wait for the child; return its exit code, or None if it must be killed."""
        known, since = 0, time.monotonic()
        while child.poll() is None:
            if self._store.check([self._key("stop")]):
                return None
            if self._rank == 0:
                found = read_events(events)
                if len(found) > known:
                    known, since = len(found), time.monotonic()
                reason = self._overdue(found, since)
                if reason:
                    self._stop(reason)
            elif not self._store.check([self._key("over")]):
                since = time.monotonic()
            elif time.monotonic() > since + _LEAVE_SECONDS:  # rank 0's child has ended
                return None
            time.sleep(_POLL_SECONDS)
        if child.returncode != 0:
            self._stop("")
        if self._rank == 0:
            self._store.set(self._key("over"), "")
        return child.returncode

    def _overdue(self, events: Sequence[Mapping[str, Any]], since: float) -> str:
        """Return why the children must be killed now; empty if they need not."""
        if time.monotonic() > self._deadline:
            return NO_TIME
        if not events or events[-1]["kind"] != "begin":
            limit, what = _START_SECONDS, "starting the process, or continuing,"
        else:
            limit, what = PARTS[events[-1]["task"][0]].seconds, "it"
        limit *= self._patience
        return f"{what} took more than {limit:g} s" if time.monotonic() > since + limit else ""

    def _stop(self, reason: str) -> None:
        """Make all ranks kill their children; only the first reason is kept."""
        self._store.compare_set(self._key("stop"), "", json.dumps(reason))

    def _conclude(
        self, tasks: list[Task], events: Path, log: Path, code: int | None, began: float
    ) -> list[Outcome]:
        """Gather how the children of all ranks ended; return the outcomes on rank 0.

        Args:
            code: The child's exit code; None if it was killed.
        """
        found = read_events(events)
        fail = next((e for e in found if e["kind"] == "fail"), None)
        if fail is None and code:
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            fail = {"time": time.time(), "reason": f"the process died with {how}", "died": True}
        ending = {"rank": self._rank, "fail": fail, "log": _tail(log) if fail else []}
        self._store.set(self._key(f"ended/{self._rank}"), json.dumps(ending))
        if self._rank != 0:
            return []
        endings = [
            json.loads(self._wait(self._key(f"ended/{rank}"))) for rank in range(self._ranks)
        ]
        outcomes = list(_finished(found, began))
        if len(outcomes) < len(tasks):
            outcomes += self._unfinished(tasks[len(outcomes) :], found, endings, _tail(log), began)
        for outcome in outcomes:
            self._report(outcome)
        return outcomes

    def _unfinished(
        self,
        tasks: list[Task],
        events: Sequence[Mapping[str, Any]],
        endings: Sequence[Mapping[str, Any]],
        log: Sequence[str],
        began: float,
    ) -> list[Outcome]:
        """Return the outcome of the task in which the children were killed, or of all if none had
        begun."""
        reason = self._stop_reason()
        if reason == NO_TIME:
            return [Outcome(task, "left out", reason=NO_TIME) for task in tasks]
        fails = [e for e in endings if e["fail"] is not None]
        if not reason and fails:
            # A process that dies without an exception makes its peers' collectives raise.
            first = min(fails, key=lambda e: (not e["fail"].get("died"), e["fail"]["time"]))
            where = f"rank {first['rank']}: " if self._ranks > 1 else ""
            reason, log = where + first["fail"]["reason"], first["log"]
        begun = [e for e in events if e["kind"] == "begin"]
        broken = tasks[:1] if begun else tasks
        seconds = time.time() - (begun[-1]["time"] if begun else began)
        return [
            Outcome(task, "failed", seconds, reason or "the process was killed", log=log)
            for task in broken
        ]

    def _left_out(self, tasks: list[Task]) -> list[Outcome]:
        outcomes = [Outcome(task, "left out", reason=NO_TIME) for task in tasks]
        if self._rank == 0:
            for outcome in outcomes:
                self._report(outcome)
        return outcomes

    # ------------------------------------------------------------------ what ranks agree on

    def _agree(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        self._agreements += 1
        key = f"bench/agreed/{self._agreements}"
        if self._rank == 0:
            self._store.set(key, json.dumps(value))
        return json.loads(self._wait(key))

    def _key(self, name: str) -> str:
        return f"bench/{self._round}/{name}"

    def _stop_reason(self) -> str:
        key = self._key("stop")
        return json.loads(self._store.get(key)) if self._store.check([key]) else ""

    def _wait(self, key: str) -> bytes:
        longest = max(0.0, self._deadline - time.monotonic()) + 120.0
        self._store.wait([key], timedelta(seconds=longest))
        return self._store.get(key)


# ---------------------------------------------------------------------------- a child


def _start(request: Request, output: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    # A child's failure must not be reported as the launcher's.
    environment.pop("TORCHELASTIC_ERROR_FILE", None)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return subprocess.Popen(
        [sys.executable, "-m", "jepa_dist.bench.child", request.to_json()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its loader and compiler processes are killed with it
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _finished(events: Sequence[Mapping[str, Any]], began: float) -> list[Outcome]:
    """Return the outcomes of the tasks that a child has finished."""
    outcomes = []
    for event in events:
        if event["kind"] == "begin":
            began = event["time"]
        elif event["kind"] == "end":
            measured = Measured.from_json(event["measured"])
            seconds = event["time"] - began
            outcomes.append(Outcome(Task(*event["task"]), "ok", seconds, measured=measured))
        elif event["kind"] == "skip":
            seconds = event["time"] - began
            outcomes.append(
                Outcome(Task(*event["task"]), "skipped", seconds, reason=event["reason"])
            )
    return outcomes


def _tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
