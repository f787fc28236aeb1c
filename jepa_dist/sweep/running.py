"""Train and evaluate the members of a sweep on this machine, one or several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from jepa_dist.errors import UserError
from jepa_dist.monitor.evaluation_file import EVALUATION, read_evaluation
from jepa_dist.sweep.members import EvaluationPlan, Member

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

Work = Callable[[Member, "Slot"], str | None]
"""Runs the commands of one member; returns None, or the problem."""


@dataclass
class Commands:
    """The running commands, and the stop signal, if one was received."""

    stopped_by: int | None = None
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    # Reentrant: a second signal may interrupt the handler of the first.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def run(self, command: Sequence[str], output: Path | None, environ: Mapping[str, str]) -> int:
        """Run a command to its end and return its exit code; after a request to stop, do nothing.

        The command gets its own session; otherwise Ctrl-C would reach torchrun twice: from the
        terminal and from here.

        Args:
            command: Its words.
            output: File that its output is added to (default: this process's output).
            environ: Changes to the environment.
        """
        with open(output, "ab") if output else nullcontext() as file, self._lock:
            if self.stopped_by is not None:
                return 128 + self.stopped_by
            process = subprocess.Popen(
                command,
                start_new_session=True,
                env={**os.environ, **environ},
                stdout=file,
                stderr=file,
            )
            self._running.append(process)
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        return code

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Forward stop signals to the commands that run meanwhile. In the main thread only."""
        before = {number: signal.signal(number, self._stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        with self._lock:
            self.stopped_by = self.stopped_by or number
            for process in self._running:
                process.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Slot:
    """Execution of one member at a time: its commands and the devices that they may use."""

    commands: Commands
    devices: str | None
    """Value of ``CUDA_VISIBLE_DEVICES``; None leaves it as it is."""
    is_alone: bool
    """Whether it is the only slot: its commands then print to the terminal."""

    def run(self, member: Member, command: Sequence[str], **environ: str) -> int:
        """Run a command for a member, with these environment variables; return its exit code."""
        if self.devices is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.devices
        if self.is_alone:
            return self.commands.run(command, None, environ)
        output = output_of(member)
        output.parent.mkdir(parents=True, exist_ok=True)
        return self.commands.run(command, output, environ)


def output_of(member: Member) -> Path:
    """Return the output file of a member that is trained concurrently with others."""
    return member.run_dir.with_name(f"{member.run_dir.name}.out")


def train_all(members: Sequence[Member], plan: EvaluationPlan | None, jobs: int) -> int:
    """Train and evaluate the members, ``jobs`` at a time; finished ones exit immediately.

    Returns:
        0 if all are finished, 1 if at least one failed, 128 + n if stopped by signal n.

    Raises:
        UserError: ``NPROC_PER_NODE`` is not a number of ranks.
    """
    ranks = _num_ranks(jobs)

    def train(member: Member, slot: Slot) -> str | None:
        # Before torchrun, which would add its own report to a mistake's one line.
        code = slot.run(member, check_command(member), WORLD_SIZE=str(ranks))
        if code:
            return f"not started (exit code {code})"
        code = slot.run(member, train_command(member, ranks, jobs))
        if code != 0 or _state(member) != "finished":
            return f"not finished (exit code {code}, state {_state(member)})"
        return None if plan is None else _evaluate(member, plan, slot)

    # Counted in the whole sweep, of which ``members`` may be the last ones.
    return _run_all(members, train, f"member {{}} of {members[-1].index + 1}", ranks, jobs)


def evaluate_all(members: Sequence[Member], plan: EvaluationPlan, jobs: int) -> int:
    """Evaluate the finished members whose ``evaluation.json`` is missing or out of date.

    Returns:
        0 if all could be evaluated, 1 if at least one failed, 128 + n if stopped by signal n.
    """

    def evaluate(member: Member, slot: Slot) -> str | None:
        return _evaluate(member, plan, slot)

    chosen = [member for member in members if _needs_evaluation(member, plan)]
    return _run_all(chosen, evaluate, "evaluating member {}", 1, jobs)


def train_commands(members: Sequence[Member], jobs: int) -> list[list[str]]:
    """Return the commands that ``train_all`` runs, without those that evaluate.

    Raises:
        UserError: as ``train_all``.
    """
    ranks = _num_ranks(jobs)
    return [train_command(member, ranks, jobs) for member in members]


def evaluate_commands(members: Sequence[Member], plan: EvaluationPlan) -> list[list[str]]:
    """Return the commands that ``evaluate_all`` runs."""
    return [
        _evaluate_command(member, plan) for member in members if _needs_evaluation(member, plan)
    ]


def check_command(member: Member) -> list[str]:
    """Return the command that checks what a member's training would read and write."""
    return [sys.executable, "-m", "jepa_dist.train", *member.arguments, "--check"]


def train_command(member: Member, ranks: int, jobs: int) -> list[str]:
    """Return the command that trains a member, concurrently with ``jobs - 1`` others."""
    share = max(1, (os.cpu_count() or 1) // (ranks * jobs))
    return [
        *("env", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS') or share}"),
        *(sys.executable, "-m", "jepa_dist.process.agent", "--rdzv-backend=loopback"),
        *(f"--nproc-per-node={ranks}", "-m", "jepa_dist.train", *member.arguments),
    ]


# ---------------------------------------------------------------------------- slots


def _run_all(members: Sequence[Member], work: Work, title: str, ranks: int, jobs: int) -> int:
    """Do the work of each member in a slot; name what went wrong and return the exit code."""
    commands = Commands()
    slots: SimpleQueue[Slot] = SimpleQueue()
    for devices in _devices(ranks, jobs):
        slots.put(Slot(commands, devices, is_alone=jobs == 1))

    def one(member: Member) -> str | None:
        slot = slots.get()
        try:
            if commands.stopped_by is not None:
                return None
            where = "" if slot.is_alone else f" (output: {output_of(member)})"
            print(f"{title.format(member.index)}: {member.run_dir}{where}", flush=True)
            wrong = work(member, slot)
            if not slot.is_alone and commands.stopped_by is None:
                print(f"{member.run_dir}: {wrong or 'done'}", flush=True)
            return wrong
        finally:
            slots.put(slot)

    with commands.stoppable(), ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(one, members))
    if commands.stopped_by is not None:
        print("stopped; the same command resumes the sweep")
        return 128 + commands.stopped_by
    problems = [
        f"error: {member.run_dir}: {wrong}; see its messages"
        f"{' above' if jobs == 1 else f' in {output_of(member)}'}"
        for member, wrong in zip(members, found, strict=True)
        if wrong
    ]
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    return int(bool(problems))


def _devices(ranks: int, jobs: int) -> list[str | None]:
    """Return ``CUDA_VISIBLE_DEVICES`` of each slot: GPUs are assigned in turn, so that two
    slots share one only if there are too few."""
    if jobs == 1:
        return [None]
    import torch  # imported here because it is slow

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or ranks > len(names):
        return [None] * jobs
    return [
        ",".join(names[(slot * ranks + rank) % len(names)] for rank in range(ranks))
        for slot in range(jobs)
    ]


# ---------------------------------------------------------------------------- members


def _evaluate(member: Member, plan: EvaluationPlan, slot: Slot) -> str | None:
    """Evaluate a finished member whose ``evaluation.json`` is not up to date."""
    if not _needs_evaluation(member, plan):
        return None
    code = slot.run(member, _evaluate_command(member, plan))
    return f"not evaluated (exit code {code})" if code else None


def _evaluate_command(member: Member, plan: EvaluationPlan) -> list[str]:
    arguments = plan.arguments(member.run_dir, member.resolve())
    return [sys.executable, "-m", "jepa_dist.evaluate", *arguments]


def _needs_evaluation(member: Member, plan: EvaluationPlan) -> bool:
    """Return whether it is finished, and its ``evaluation.json`` not that of its final weights."""
    if _state(member) != "finished":
        return False
    expected = plan.inputs(member.resolve().quantization)
    try:
        evaluation = read_evaluation(member.run_dir / EVALUATION)
        step = json.loads((member.run_dir / "status.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return True
    return evaluation is None or evaluation.step != step or evaluation.inputs() != expected


def _num_ranks(jobs: int) -> int:
    """Return the ranks of a member: ``NPROC_PER_NODE``, or this machine's GPUs per job."""
    given = os.environ.get("NPROC_PER_NODE")
    if given is None:
        import torch  # imported here because it is slow

        return max(1, (torch.cuda.device_count() or 2) // jobs)
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"NPROC_PER_NODE={given}: expected a number of ranks")
    return int(given)


def _state(member: Member) -> str:
    """Return the state in the member's status.json; torchrun's exit code does not show it."""
    try:
        return str(json.loads((member.run_dir / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        return "unknown"
