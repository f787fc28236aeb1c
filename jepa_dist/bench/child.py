"""One process of ``bench gpu``: measures some tasks and writes events to a file.

``python -m jepa_dist.bench.child REQUEST`` with the request as JSON; started by
``jepa_dist.bench.supervisor`` only.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from jepa_dist.bench.parts import run_part
from jepa_dist.bench.session import Session, Settings, Skipped, Task
from jepa_dist.config import ParallelConfig
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.process.dist_env import die_with_parent, is_launched, launched_world_size


@dataclass(frozen=True)
class Request:
    """The tasks of one child process."""

    tasks: Sequence[Task]
    settings: Settings
    folder: Path
    events: Path
    """File for this rank's events, one JSON object per line."""
    prefix: str
    """Prefix of this process group's keys in the launcher's store."""

    def to_json(self) -> str:
        """Return it as JSON; ``from_json`` reads it."""
        return json.dumps(asdict(self) | {"tasks": [tuple(t) for t in self.tasks]}, default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what ``to_json`` wrote."""
        value = json.loads(text)
        settings = value["settings"] | {"overrides": tuple(value["settings"]["overrides"])}
        return cls(
            [Task(*task) for task in value["tasks"]],
            Settings(**settings),
            Path(value["folder"]),
            Path(value["events"]),
            value["prefix"],
        )


class Events:
    """Event file of a child process, which the parent reads while the child runs."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, **values: Any) -> None:
        """Append one event: ``begin``, ``end``, ``skip`` or ``fail``."""
        self._file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")


def read_events(path: Path) -> list[Mapping[str, Any]]:
    """Return all events that have been written completely."""
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def main() -> None:
    """Measure the tasks of the request in this process."""
    die_with_parent()
    request = Request.from_json(sys.argv[1])
    events = Events(request.events)
    try:
        _measure(request, events)
    except BaseException as error:
        traceback.print_exc()
        events.write("fail", reason=_reason(error))
        sys.stderr.flush()
        # Skip clean-up, which could wait for ranks that wait for this one.
        os._exit(1)
    atexit._run_exitfuncs()  # releases semaphores
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _measure(request: Request, events: Events) -> None:
    _share_cores()
    world = start_world(_parallel(request), store=_store(request.prefix))
    session = Session(world, request.settings, request.folder)
    for task in request.tasks:
        events.write("begin", task=task)
        try:
            measured = run_part(task, session)
        except Skipped as reason:
            world.gather(None)
            events.write("skip", task=task, reason=str(reason))
            continue
        world.gather(None)  # it has ended on every rank
        events.write("end", task=task, measured=measured.to_json())
    session.close()
    stop_world()


def _parallel(request: Request) -> ParallelConfig:
    """Return the mesh settings of the tasks' common configuration, or the default ones."""
    configs = {task.config for task in request.tasks}
    (config,) = configs if len(configs) == 1 else (None,)
    return ParallelConfig() if config is None else request.settings.config(config).parallel


def _store(prefix: str) -> Store | None:
    """Return the rendezvous store of this group: the parents' store with a prefix."""
    if not is_launched():
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(prefix, TCPStore(address, port, is_master=False))


def _share_cores() -> None:
    if not torch.cuda.is_available() and launched_world_size() > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launched_world_size()))


def _reason(error: BaseException) -> str:
    """Return the error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0]}" if lines else kind


if __name__ == "__main__":
    main()
