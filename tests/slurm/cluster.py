"""A private virtual SLURM cluster on this machine: real daemons, no systemd, nothing left behind.

One munged, one slurmctld and a slurmd for each node run as children of the test, in the
foreground, on free ports of the loopback interface, with configuration, keys, state and logs in one
folder. What runs in its jobs is found again by ``SLURM_CONF`` in its environment.

Packages (Debian): slurm-wlm, munge.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.commands import environment_of
from tests.support.patience import patience, wait_until

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
_SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
_LONGEST_FOLDER = 107 - len("/spool.n8/n8_12345678.4294967291")
_START_SECONDS = 60.0
# Job ids begin at a random number below this one: two clusters on one machine have different ids,
# and different ports, which are derived from job ids.
_MAX_FIRST_JOB_ID = 10_000_000
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}

_LINES = ("Command", "WorkDir", "StdOut", "StdErr")

_CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5,sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
JobRequeue=1
FirstJobId={first_job_id}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{gres_types}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs of SLURM and munge that are not installed here."""
    return [name for name in _PROGRAMS if _find(name) is None]


class Cluster:
    """``with Cluster(folder, nodes=4) as cluster``: nodes n1 ... n4, all idle.

    Two partitions over all nodes: ``low`` (the default) and ``high``, whose jobs preempt those of
    ``low`` (they are requeued, after at most 60 s of grace).

    Args:
        folder: For everything that the daemons write; must not exist.
        nodes: How many.
        gpus: How many (at most 3, which are none) each node says it has.
    """

    def __init__(self, folder: Path, nodes: int, gpus: int = 0) -> None:
        # It contains SLURM's sockets, whose paths may have at most 107 characters.
        assert len(str(folder)) <= _LONGEST_FOLDER, f"{folder}: too long a name for sockets"
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._gpus = gpus
        self._first_job_id = random.randrange(1, _MAX_FIRST_JOB_ID)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------------ start and stop

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        self.folder.mkdir(mode=0o755)
        self._configure()
        munge = {name: f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file")}
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("log-file", "seed-file")]
        key = [f"--key-file={self.folder}/munge.key", "--num-threads=2", "--force"]
        self._launch("munged", "--foreground", *munge.values(), *files, *key)
        _wait_until((self.folder / "munge.socket").exists, _START_SECONDS, "munged", self.logs)
        self._launch("slurmctld", "-D", "-c", "-f", self.environ["SLURM_CONF"])
        _wait_until(self._controller_is_up, _START_SECONDS, "slurmctld", self.logs)
        for name in self.names:
            self.start_node(name)
        self.wait_until_idle(_START_SECONDS)

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller_port, *ports = _free_ports(1 + len(self.names))
        host = socket.gethostname().partition(".")[0]
        gres = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs=4 RealMemory=2000{gres}"
            for name, port in zip(self.names, ports, strict=True)
        ]
        if self._gpus:
            devices = ["/dev/null", "/dev/zero", "/dev/full"][: self._gpus]
            lines = [f"Name=gpu File={device}\n" for device in devices]
            (self.folder / "gres.conf").write_text("".join(lines))
        text = _CONFIGURATION.format(
            host=host,
            user=_user(),
            folder=self.folder,
            controller_port=controller_port,
            first_job_id=self._first_job_id,
            gres_types="GresTypes=gpu" if self._gpus else "",
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _launch(self, name: str, *arguments: str, label: str | None = None) -> None:
        program = _find(name)
        assert program is not None, f"{name} is not installed"
        with (self.folder / f"{label or name}.out").open("ab") as output:
            self._daemons[label or name] = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                start_new_session=True,
            )

    def _controller_is_up(self) -> bool:
        return (
            subprocess.run(
                ["scontrol", "ping"], env=self.environment(), capture_output=True, text=True
            )
            .stdout.strip()
            .endswith("UP")
        )

    def _stop(self) -> None:
        """End everything, by process id: jobs first, the daemons after them."""
        for process in self.processes():
            _kill(process)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _wait_until(self._is_empty, 20, "the end of all processes", self.logs)

    def _is_empty(self) -> bool:
        ours = self.processes()
        for process in ours:
            _kill(process)
        return not ours

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this cluster's jobs, and the step daemons."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        return [
            process
            for process in psutil.process_iter()
            if process.pid not in daemons and self._is_ours(process)
        ]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.environ().get("SLURM_CONF") == self.environ["SLURM_CONF"]:
                return process.pid != os.getpid()
            # A step daemon writes its title over its environment: "slurmstepd: [123.batch]".
            title = " ".join(process.cmdline())
        except (psutil.Error, OSError):  # ended, a zombie, or another user's
            return False
        job = title.removeprefix("slurmstepd: [").partition(".")[0]
        return title.startswith("slurmstepd: [") and self._is_our_job(job)

    def _is_our_job(self, job: str) -> bool:
        return job.isdigit() and 0 <= int(job) - self._first_job_id < 1000

    # ------------------------------------------------------------------ use

    def run(self, *command: Any, timeout: float = 60) -> str:
        """Run a SLURM command; returns its output."""
        finished = subprocess.run(
            [str(part) for part in command],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
        )
        assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        return finished.stdout

    def sbatch(self, *arguments: Any, cwd: Path, environ: Mapping[str, Any] | None = None) -> Job:
        """Submit from ``cwd``; ``environ`` is added to the environment that the job inherits."""
        finished = subprocess.run(
            ["sbatch", "--parsable", *(str(argument) for argument in arguments)],
            env=self.environment(environ),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience(60),
        )
        assert finished.returncode == 0, finished.stderr
        return Job(self, finished.stdout.strip().partition(";")[0])

    def clear(self) -> None:
        """End all jobs and bring all nodes back."""
        self.run("scancel", "--user", _user())
        for job in self.run("squeue", "--noheader", "--format=%A").split():
            # Without time to save.
            self._kill_tasks(job)
        for name in self.names:
            if self._daemons[f"slurmd.{name}"].poll() is not None:
                self.start_node(name)
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        for name, state in {tuple(line.split()) for line in states}:
            if state.startswith(("drain", "down")):
                # Refused if the node, just started, has come back meanwhile.
                with contextlib.suppress(AssertionError):
                    self.run("scontrol", "update", f"node={name}", "state=resume")
        self.wait_until_idle(60)

    def _kill_tasks(self, job: str) -> None:
        for process in self.processes():
            if environment_of(process).get("SLURM_JOB_ID") == job:
                _kill(process)

    def wait_until_idle(self, timeout: float) -> None:
        """Wait until every node is idle: no job runs or completes."""

        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
            return bool(states) and set(states) == {"idle"}

        _wait_until(idle, timeout, "idle nodes", self.logs)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        paths = sorted(self.folder.glob("*.log"))
        ends = [(path.name, path.read_text(errors="replace")[-3000:]) for path in paths]
        return "\n".join(f"---- {name}\n{end}" for name, end in ends)

    # ------------------------------------------------------------------ failures

    def start_node(self, name: str) -> None:
        """Start the node's slurmd (again)."""
        config = self.environ["SLURM_CONF"]
        self._launch("slurmd", "-D", "-c", "-f", config, "-N", name, label=f"slurmd.{name}")

    def kill_node(self, name: str) -> None:
        """Kill slurmd, the step daemons and their processes, as a power failure does."""
        daemon = self._daemons[f"slurmd.{name}"]
        found = self._processes_on(name)
        assert found, f"nothing runs on {name}"
        daemon.kill()
        daemon.wait()
        # Also what they start meanwhile: a remaining srun would end the step of the same number
        # when the job runs again.
        while found:
            for process in found:
                _kill(process)
            time.sleep(0.1)
            found = self._processes_on(name)

    def _processes_on(self, name: str) -> list[psutil.Process]:
        """Return the step daemons of a node, and then what they run."""
        tasks = [p for p in self.processes() if environment_of(p).get("SLURMD_NODENAME") == name]
        steps = {parent.pid: parent for task in tasks for parent in _step_daemons(task)}
        return [*steps.values(), *tasks]

    def environment(self, changes: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return our environment without variables of another SLURM or test run."""
        strange = ("JEPA_", "SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
        fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **self.environ}
        return kept | fixed | {name: str(value) for name, value in (changes or {}).items()}


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str

    def field(self, name: str) -> str:
        """Return a field of ``scontrol show job``, e.g. JobState, Restarts, NodeList."""
        text = self.cluster.run("scontrol", "show", "job", self.id)
        # Several fields share a line, except those whose values may hold spaces.
        rest = " ".join(text.splitlines()).partition(f" {name}=")[2]
        return rest.partition("   " if name in _LINES else " ")[0]

    def state(self) -> str:
        """E.g. PENDING, RUNNING, COMPLETED, FAILED."""
        return self.field("JobState")

    def output(self) -> str:
        """Return the output of all its starts so far."""
        path = Path(self.field("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until the condition holds; fail if the job ends before."""

        def holds() -> bool:
            if condition():
                return True
            assert self.state() not in _ENDED, f"ended before {what}:\n{self.output()}"
            return False

        _wait_until(holds, timeout, what, self.output)

    def wait(self, timeout: float) -> str:
        """Wait until it has ended and is not requeued; return its state."""
        _wait_until(lambda: self.state() in _ENDED, timeout, "the job's end", self._tell)
        return self.state()

    def _tell(self) -> str:
        return self.output() + self.cluster.run("scontrol", "show", "job", self.id)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _find(program: str) -> str | None:
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS])
    return shutil.which(program, path=folders)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _step_daemons(task: psutil.Process) -> Iterable[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [parent for parent in task.parents() if parent.name() == "slurmstepd"]
    return []


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def _wait_until(
    condition: Callable[[], bool], timeout: float, what: str, tell: Callable[[], str]
) -> None:
    wait_until(condition, timeout, lambda: f"{what}\n{tell()}", every=0.5)
