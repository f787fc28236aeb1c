"""The parts of ``bench gpu``, with their time limits and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jepa_dist.bench import parts_kernels, parts_machine, parts_trainer
from jepa_dist.bench.session import Measured, Session, Task


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    measure: Callable[..., Measured]
    """Takes the session, and the configuration's path unless ``configs`` is ``none``."""
    seconds: float
    """Time limit on a GPU."""
    process: str
    """Parts with the same name share a process, one per configuration except for ``machine``."""
    configs: str = "each"
    """Configurations it is measured for: ``each``, the ``first``, or ``none`` (needs no model)."""
    ranks: int = 1
    """Minimum number of ranks; a part that needs several needs an even number."""


# In order of importance, since the time may run out before the end.
PARTS: dict[str, Part] = {
    "collectives": Part(parts_machine.collectives, 60, "machine", configs="none"),
    "stragglers": Part(parts_machine.stragglers, 60, "machine", configs="none", ranks=2),
    "bandwidth": Part(parts_machine.bandwidth, 60, "machine", configs="none", ranks=2),
    "launches": Part(parts_machine.launches, 30, "machine", configs="none"),
    "copies": Part(parts_machine.copies, 60, "machine", configs="none"),
    "attention": Part(parts_kernels.attention, 60, "machine"),
    "matrices": Part(parts_kernels.matrices, 60, "machine"),
    "newton_schulz": Part(parts_kernels.newton_schulz, 60, "machine"),
    "step": Part(parts_trainer.step, 150, "trainer"),
    "jepa": Part(parts_trainer.jepa, 90, "trainer"),
    "checkpoint": Part(parts_trainer.checkpoint, 120, "trainer", configs="first"),
    "hsdp": Part(parts_trainer.hsdp, 120, "hsdp", configs="first", ranks=2),
    "floor": Part(parts_trainer.floor, 240, "floor", configs="first"),
}


def run_part(task: Task, session: Session) -> Measured:
    """Measure one task. Collective."""
    measure = PARTS[task.part].measure
    return measure(session) if task.config is None else measure(session, task.config)


def plan(names: Sequence[str], configs: Sequence[str], ranks: int) -> list[list[Task]]:
    """Return the tasks that apply to this number of ranks, one list per process, in order."""
    processes: dict[tuple[str, str | None], list[Task]] = {}
    for name, part in PARTS.items():
        if name not in names or (part.ranks > 1 and (ranks < part.ranks or ranks % 2)):
            continue
        for config in _configs_of(part, configs):
            shared = None if part.process == "machine" else config
            processes.setdefault((part.process, shared), []).append(Task(name, config))
    return list(processes.values())


def _configs_of(part: Part, configs: Sequence[str]) -> list[str | None]:
    if part.configs == "none":
        return [None]
    return list(configs[:1] if part.configs == "first" else configs)
