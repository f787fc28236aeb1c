"""Start runs, inject faults, wait for the end, and compare with an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from jepa_dist.monitor.run_dir import read_status
from tests.chaos.moments import Moment, heartbeat, is_saving, last_record
from tests.support.commands import Command, Finished
from tests.support.tiny import REPOSITORY, write_corpus
from tests.support.train_command import settings

STEPS = 60
RANKS = 2
SAVE_EVERY = 5
EVALUATE_EVERY = 20
RECIPE = {
    "train__steps": STEPS,
    "checkpoint__every": SAVE_EVERY,
    "eval__every": EVALUATE_EVERY,
    "data__workers": 1,
    "optim__matrix": "muon",
    "optim__ema_decay": 0.9,
    "monitor__late_seconds": 2,
}
# Relative, of losses on CUDA in bfloat16, whose default algorithms sum in no fixed order.
CUDA_TOLERANCE = 1e-2
# Seconds; far more than anything takes on an idle machine.
LONG = 120.0

_POLL_SECONDS = 0.01
_TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
# How long torchrun waits for ranks to exit after its stop signal.
_ENVIRON = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}


class MissedError(Exception):
    """The run ended before the fault could be injected."""


class SkippedError(Exception):
    """This machine does not permit the scenario."""


@dataclass
class Strike:
    """An injected fault, and how long the run took to recover."""

    what: str
    starts: int
    """Number of starts before the fault."""
    step: int
    """Last step recorded before the fault."""
    time: float
    restarts: bool
    """Whether recovery needs a new start."""
    recovered: float | None = None

    def is_over(self, record: dict[str, Any]) -> bool:
        """Return whether ``record`` is of a step after the recovery."""
        if self.restarts:
            return bool(record.get("goodput/starts", 0) > self.starts)
        return bool(record.get("step", 0) > self.step + 1)


@dataclass(frozen=True)
class Result:
    """The result of a round."""

    number: int
    scenario: str
    outcome: str
    """``survived``, ``failed``, ``missed`` (the run ended before the fault), or ``skipped`` (not
    possible on this machine)."""
    details: list[str]
    redone: int = 0
    """Steps taken more than once."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each fault to the first new step."""
    seconds: float = 0.0
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return asdict(self)


class Session:
    """What the rounds share: the corpus, and reference runs, each made at its first use.

    Args:
        folder: Working folder.
        patience: Factor on all time limits, for a busy machine.
    """

    def __init__(self, folder: Path, patience: float = 1.0) -> None:
        self.folder = folder
        self.patience = patience
        write_corpus(folder, train_tokens=20_000, val_tokens=4000)

    @cached_property
    def undisturbed(self) -> Path:
        """Run directory of an undisturbed run."""
        return self._make("undisturbed")

    @cached_property
    def compiled(self) -> Path:
        """Run directory of an undisturbed run with compiled regions."""
        return self._make("compiled", parallel__compile=True)

    @cached_property
    def stopped(self) -> Path:
        """Run directory of a run that was stopped early, with two checkpoints."""
        return self._make("stopped", train__stop_at=3 * SAVE_EVERY + 2)

    def _make(self, name: str, **changes: Any) -> Path:
        run = Run(self, self.folder / name, random.Random(0), changes)
        with run:
            run.start()
            ended = run.wait_for_end()
        if ended.code != 0:
            raise RuntimeError(f"the reference run {name!r} failed:\n{ended.output}")
        return run.dir


class Run:
    """The run of a round: the processes of all its starts, and its directory.

    Args:
        session: What the rounds share.
        folder: Contains the run directory.
        generator: Makes all random choices of the round.
        changes: Changes of the configuration, as in ``RECIPE``.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        generator: random.Random,
        changes: dict[str, Any] | None = None,
    ) -> None:
        self.random = generator
        self.dir = folder / "run"
        self.checkpoints = self.dir / "checkpoints"
        self.details: list[str] = []
        self.strikes: list[Strike] = []
        self.outputs: list[str] = []
        self.environ: dict[str, str] = {}
        self.under: list[str] = []
        """Command that executes torchrun, e.g. nohup."""
        self.session = session
        self.changes = dict(changes or {})
        self._folder = folder
        self._commands: list[Command] = []
        self._open = ExitStack()
        self._again: Callable[[], None] = self.start
        self._reached: dict[int, int] = {}
        folder.mkdir()

    # ------------------------------------------------------------------ starting

    def start(self, ranks: int = RANKS, max_restarts: int = 3) -> None:
        """Start or restart under one torchrun."""
        self._again = lambda: self.start(ranks, max_restarts)
        elastic = ("--nnodes=1:1", f"--max-restarts={max_restarts}", "--monitor-interval=0.5")
        workers = (f"--nproc-per-node={ranks}", "-m", "jepa_dist.train")
        torchrun = [_TORCHRUN, *elastic, "--rdzv-backend=loopback", *workers]
        self._run([*self.under, *torchrun, *self._settings()])

    def start_agent(self, number: int, port: int) -> None:
        """Start one of two agents with a rank each, as on two hosts; either of them may be lost.

        Args:
            number: Agent 0 hosts the rendezvous.
            port: Port of the rendezvous.
        """
        self._again = lambda: self.start_agent(0, free_port())
        options = ["--nodes", "2", "--min-nodes", "1", "--head", "127.0.0.1", "--port", str(port)]
        identity = ["--node-rank", str(number), "--id", f"chaos-{port}", "--same-machine"]
        self.environ |= {"NPROC_PER_NODE": "1", "VENV": str(Path(sys.executable).parent.parent)}
        script = REPOSITORY / "launch" / "multinode.sh"
        self._run(["bash", script, *options, *identity, *self._settings()])

    def take_over_stopped(self) -> None:
        """Begin with a copy of the session's stopped run."""
        shutil.copytree(self.session.stopped, self.dir)

    def _run(self, command: list[Any]) -> None:
        running = self._open.enter_context(Command(command, environ=_ENVIRON | self.environ))
        self._commands.append(running)

    def _settings(self) -> list[str]:
        limit = {"parallel__timeout_seconds": 60 * self.session.patience}
        changes = RECIPE | limit | self.changes | {"run__dir": self.dir}
        return settings(self.session.folder, **changes)

    # ------------------------------------------------------------------ watching

    @property
    def step(self) -> int:
        """The last recorded step."""
        return int(last_record(self.dir).get("step", 0))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """All starts in starts.jsonl."""
        with suppress(FileNotFoundError):
            lines = (self.dir / "starts.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        return []

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json."""
        return read_status(self.dir)

    def output(self) -> str:
        """Return the output of all starts."""
        return "\n".join([*self.outputs, *(command.output() for command in self._commands)])

    def wait_for(self, condition: Callable[[], bool], seconds: float = LONG) -> None:
        """Watch the run until ``condition`` holds.

        Raises:
            MissedError: the run ended before.
            AssertionError: time limit exceeded.
        """
        deadline = time.monotonic() + seconds * self.session.patience
        while not condition():
            self._observe()
            if not self.agents():
                raise MissedError("the run was over before its fault")
            assert time.monotonic() < deadline, f"waited for {seconds:g} s (x patience) in vain"
            time.sleep(_POLL_SECONDS)

    def wait_for_step(self, first: int, last: int | None = None) -> None:
        """Wait until a random step from ``first`` to ``last`` is recorded."""
        step = self.random.randint(first, last or first)
        self.wait_for(lambda: self.step >= step)

    def wait_for_ranks(self, count: int = RANKS) -> None:
        """Wait until the processes of this many ranks exist."""
        self.wait_for(lambda: len(self.ranks()) == count)

    def wait_for_phase(self, rank: int, phase: str) -> None:
        """Wait until a new heartbeat of a rank is in a phase."""
        began = heartbeat(self.dir, rank).get("beat")

        def is_there() -> bool:
            beat = heartbeat(self.dir, rank)
            return beat.get("phase") == phase and beat.get("beat") != began

        self.wait_for(is_there)

    def wait_for_end(self, seconds: float = 2 * LONG) -> Finished:
        """Wait until all commands have ended, without leftovers; return how the first one ended."""
        with suppress(MissedError):
            self.wait_for(lambda: False, seconds)
        ends = [command.wait(LONG * self.session.patience) for command in self._commands]
        self._observe()
        self.outputs += [end.output for end in ends]
        self._end_commands()
        return ends[0]

    def _observe(self) -> None:
        """Note the last step of each start, and recoveries."""
        record = last_record(self.dir)
        if record:
            start = int(record["goodput/starts"])
            self._reached[start] = max(self._reached.get(start, 0), record["step"])
        for strike in self.strikes:
            if strike.recovered is None and strike.is_over(record):
                strike.recovered = time.monotonic() - strike.time

    # ------------------------------------------------------------------ injecting faults

    def agents(self) -> list[psutil.Process]:
        """Return the running torchrun processes."""
        return [agent for command in self._commands if (agent := command.process()) is not None]

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the running ranks' processes, by rank."""
        ranks = {}
        for agent in self.agents():
            with suppress(psutil.Error):
                for child in agent.children():
                    with suppress(psutil.Error, KeyError, OSError):
                        ranks[int(child.environ()["RANK"])] = child
        return ranks

    def strike(self, what: str, *, restarts: bool = True) -> None:
        """Note that a fault is injected now."""
        self._observe()
        now = time.monotonic()
        self.strikes.append(Strike(what, len(self.starts), self.step, now, restarts))
        self.details.append(f"{what} at step {self.step}")

    def send(self, number: signal.Signals, process: psutil.Process, name: str) -> None:
        """Send a signal and note it as a fault."""
        self.strike(f"{number.name} to {name}")
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)

    def pick_rank(self) -> int:
        """Return a random running rank."""
        self.wait_for(lambda: bool(self.ranks()))
        return self.random.choice(sorted(self.ranks()))

    def kill_rank(self, rank: int | None = None) -> None:
        """Send SIGKILL to a rank; None: a random one."""
        rank = self.pick_rank() if rank is None else rank
        self.send(signal.SIGKILL, self.ranks()[rank], f"rank {rank}")

    def kill_agent(self, number: int = 0) -> None:
        """Send SIGKILL to torchrun; its ranks must exit, too."""
        agent = self.agents()[number]
        self.send(signal.SIGKILL, agent, "torchrun")
        with suppress(psutil.NoSuchProcess):
            while agent.status() != psutil.STATUS_ZOMBIE:  # before suspended ranks resume
                time.sleep(0.001)

    def press(self, number: signal.Signals) -> None:
        """Send a signal to the command's process group, as a terminal does."""
        os.killpg(os.getpgid(self.agents()[0].pid), number)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend torchrun and all its descendants, as a suspended computer does."""
        everything = [
            process
            for agent in self.agents()
            for process in (agent, *agent.children(recursive=True))
        ]
        with _frozen(everything):
            yield

    @contextmanager
    def frozen_at(self, moment: Moment, near: Moment = is_saving) -> Iterator[None]:
        """Suspend all ranks at a moment, however short it is.

        Args:
            moment: When to suspend them.
            near: While this holds, they run a millisecond at a time until ``moment`` holds.
        """
        while True:
            self.wait_for(lambda: near(self.dir))
            ranks = list(self.ranks().values())
            while near(self.dir) and self.agents():
                with _frozen(ranks):
                    if moment(self.dir):
                        yield
                        return
                time.sleep(0.001)
            if not self.agents():
                raise MissedError("the run was over before its fault")

    def slow_down_until(self, condition: Callable[[], bool]) -> None:
        """Let the ranks run a tenth of the time until ``condition`` holds."""
        deadline = time.monotonic() + LONG * self.session.patience
        while not condition():
            assert time.monotonic() < deadline, "what the run was slowed down for did not happen"
            with _frozen(list(self.ranks().values())):
                time.sleep(0.27)
            self._observe()
            time.sleep(0.03)

    # ------------------------------------------------------------------ ending

    def finish(self) -> None:
        """Wait for the end; if the run is not finished then, repeat its command once."""
        if self._commands:
            self.wait_for_end()
        if self.status.get("state") != "finished":
            self._again()
            self.wait_for_end()
        now = time.monotonic()
        for strike in self.strikes:
            if strike.recovered is None:  # no step was left to record
                strike.recovered = now - strike.time

    def redone(self) -> int:
        """Return the number of steps that were taken more than once."""
        starts = [start["step"] for start in self.starts]
        return sum(
            max(0, self._reached.get(number, begun) - following)
            for number, (begun, following) in enumerate(pairwise(starts), 1)
        )

    def _end_commands(self) -> None:
        self._commands.clear()
        self._open.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and write its output to a file."""
        self.outputs += [command.output() for command in self._commands]
        self._end_commands()
        (self._folder / "output.txt").write_text("\n".join(self.outputs), encoding="utf-8")


def play(
    session: Session, number: int, name: str, fault: Callable[[Run], None], seed: str
) -> Result:
    """Run one round: start, inject the fault, wait for the end, compare.

    Args:
        session: What the rounds share.
        number: Number of the round.
        name: Name of the scenario.
        fault: Starts the run and injects the fault.
        seed: Seed of all random choices.
    """
    reference = session.undisturbed
    began = time.monotonic()
    run = Run(session, session.folder / f"round_{number}", random.Random(seed))
    outcome, problem = "survived", ""
    try:
        with run:
            fault(run)
            run.finish()
            reference = session.compiled if run.changes.get("parallel__compile") else reference
            compare(run, reference)
    except MissedError as missed:
        outcome, problem = "missed", str(missed)
    except SkippedError as skipped:
        outcome, problem = "skipped", str(skipped)
    except Exception as error:
        outcome, problem = "failed", _describe(error, run.outputs)
    return Result(
        number=number,
        scenario=name,
        outcome=outcome,
        details=run.details,
        redone=run.redone(),
        recoveries=[strike.recovered for strike in run.strikes if strike.recovered is not None],
        seconds=time.monotonic() - began,
        problem=problem,
    )


def compare(run: Run, reference: Path) -> None:
    """Assert that a run is finished and equals the undisturbed one.

    Bit for bit if the number of ranks never changed and the device's algorithms are deterministic
    (the CPU's always are), within a tolerance otherwise; with equal tokens and spans in any case.

    Raises:
        AssertionError: the run differs.
    """
    status = run.status
    assert (status.get("state"), status.get("step")) == ("finished", STEPS), status
    is_exact = {start["world_size"] for start in run.starts} == {RANKS} and _is_deterministic(run)
    tolerance = 0.0 if is_exact else 1e-5 if _is_deterministic(run) else CUDA_TOLERANCE
    ours, expected = records(run.dir), records(reference)
    recorded = [record["step"] for record in ours if "final" not in record]
    wrong = [step for step in range(1, STEPS + 1) if recorded.count(step) != 1]
    assert not wrong, f"in metrics.jsonl never or several times: steps {wrong}"
    assert recorded == sorted(recorded), "metrics.jsonl is not in order"
    assert len(ours) == STEPS + 1, "metrics.jsonl has no closing record, or several"
    for mine, theirs in zip(ours, expected, strict=True):
        for key in ("tokens_digest", "spans_digest"):
            assert mine[key] == theirs[key], f"{key} differs at step {mine['step']}"
        for key in ("loss/total", "val/loss", "val/ema_loss"):
            if key in mine:  # the last record of a start without steps has no loss
                _assert_same(mine[key], theirs[key], tolerance, f"{key} at step {mine['step']}")
    for name in ("model.safetensors", "ema.safetensors") if is_exact else ():
        same = (run.dir / name).read_bytes() == (reference / name).read_bytes()
        assert same, f"{name} is not the undisturbed run's, bit for bit"


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return all lines of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _describe(error: Exception, outputs: list[str]) -> str:
    """Return the error and the end of the run's output."""
    lines = f"{type(error).__name__}: {error}".splitlines()[:8]
    printed = "\n".join(outputs).splitlines()[-30:]
    return "\n".join([*lines, "the run's last lines:", *printed])


def _is_deterministic(run: Run) -> bool:
    """Return whether all starts of the run used deterministic algorithms."""
    config = yaml.safe_load((run.dir / "config.yaml").read_text(encoding="utf-8"))
    on_cpu = all(start["environment"]["device"] == "CPU" for start in run.starts)
    return on_cpu or bool(config["parallel"]["deterministic"])


def _assert_same(ours: float, expected: float, tolerance: float, what: str) -> None:
    is_same = abs(ours - expected) <= tolerance * abs(expected)
    assert is_same, f"{what}: {ours!r}, undisturbed {expected!r}"


def free_port() -> int:
    """Return a free port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _frozen(processes: list[psutil.Process]) -> Iterator[None]:
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.0002)
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
