"""The launcher's environment variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

torchrun sets all of them. ``adopt_launcher`` derives them from SLURM's variables under srun, and
rejects an environment in which some are missing: such a process would wait forever, or train
separately from the other ranks.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

import psutil

from jepa_dist.errors import UserError
from jepa_dist.process.identity import pid_namespace, start_ticks

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
# Launchers that set no rendezvous address: variable with the number of processes -> name.
_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}

# The kernel assigns ports from 32768; launch/multinode.sh uses 10000 to 29999.
_FIRST_PORT, _NUM_PORTS = 20000, 10000
_SCONTROL_SECONDS = 60

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2

_FIRST_PARENT = os.getppid()
# Pid, start and namespace of torchrun's process.
_AGENT = "TORCHRUN_PROCESS"
# Programs that run as process 1, adopt orphans, and do not start ranks themselves.
_INIT_PROGRAMS = (
    *("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "conmon", "runit"),
    *("s6-svscan", "supervisord", "launchd", "bash", "sh", "dash", "zsh", "sleep", "pause"),
)


def adopt_launcher(environ: MutableMapping[str, str], *, will_meet: bool = True) -> None:
    """Complete RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or leave all unset.

    Under srun they are derived from SLURM's variables; a given MASTER_ADDR or MASTER_PORT is kept.
    Without a launcher they stay unset: world size 1.

    Args:
        environ: The environment; modified in place.
        will_meet: Whether a process group will be created. If not, WORLD_SIZE may be set without
            RANK.

    Raises:
        UserError: some of the variables are missing or not numbers.
    """
    if "RANK" not in environ and not will_meet:
        _check_numbers(environ, ("WORLD_SIZE",) if "WORLD_SIZE" in environ else ())
        return
    if "RANK" not in environ and _tasks_of_step(environ) > 1:
        _adopt_slurm(environ)
    if "RANK" not in environ:
        _refuse_rankless(environ)
        return
    missing = [name for name in _NEEDED if not environ.get(name)]
    if missing:
        raise UserError(
            f"environment: RANK={environ['RANK']!r}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing or empty; start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to train in this process alone"
        )
    _check_numbers(environ, _NUMBERS)
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if rank >= world_size:
        raise UserError(
            f"environment: RANK={rank}: must be below WORLD_SIZE={world_size}; start the ranks "
            "with torchrun"
        )


def _refuse_rankless(environ: Mapping[str, str]) -> None:
    """Raise if variables say that there are several processes although RANK is not set."""
    if "WORLD_SIZE" in environ:
        raise UserError(
            f"environment: WORLD_SIZE={environ['WORLD_SIZE']!r} is set, but RANK is not; start the "
            "ranks with torchrun, or unset WORLD_SIZE to train in this process alone"
        )
    for name, launcher in _OTHER_LAUNCHERS.items():
        if environ.get(name, "1") != "1":
            raise UserError(
                f"environment: {name}={environ[name]!r} is set, but RANK is not: {launcher} does "
                "not say where the ranks meet; start them with torchrun or srun, or set "
                f"{', '.join(_NEEDED)} for each"
            )


def _check_numbers(environ: Mapping[str, str], names: Iterable[str]) -> None:
    wrong = [n for n in names if not re.fullmatch(r"[0-9]{1,9}", environ[n])]
    if wrong:
        raise UserError(
            *(f"environment: {name}={environ[name]!r}: expected a number from 0" for name in wrong)
        )


def _tasks_of_step(environ: Mapping[str, str]) -> int:
    """Return the number of tasks in this srun step; 1 outside of srun."""
    if "SLURM_PROCID" not in environ:
        return 1
    name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in environ), None)
    if name is None:
        return 1
    if not environ[name].isdecimal():
        raise UserError(f"environment: {name}={environ[name]!r}: expected a number of tasks")
    return int(environ[name])


def _adopt_slurm(environ: MutableMapping[str, str]) -> None:
    missing = [name for name in _SLURM if not environ.get(name, "").isdecimal()]
    if missing:
        raise UserError(
            f"environment: SLURM_PROCID={environ['SLURM_PROCID']!r} of {_tasks_of_step(environ)} "
            f"tasks, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing or "
            "not a number; start the ranks with srun or torchrun, or unset SLURM_PROCID to train "
            "in this process alone"
        )
    if not environ.get("MASTER_ADDR"):
        environ["MASTER_ADDR"] = _first_address(environ)
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = str(_tasks_of_step(environ))
    step = int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
    environ.setdefault("MASTER_PORT", str(_FIRST_PORT + step % _NUM_PORTS))


def _first_address(environ: Mapping[str, str]) -> str:
    """Return the address of the step's first node; node names may not be resolvable."""
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    try:
        first = _scontrol("hostnames", environ["SLURM_STEP_NODELIST"]).split()[0]
        words = _scontrol("node", first).split()
        return next(w for w in words if w.startswith("NodeAddr=")).partition("=")[2]
    except (KeyError, IndexError, StopIteration, OSError, subprocess.SubprocessError):
        raise UserError(
            "environment: the rendezvous address cannot be derived from SLURM "
            "(SLURM_STEP_NODELIST, scontrol); set MASTER_ADDR to the first node's address"
        ) from None


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "show", what, name]
    return subprocess.run(
        command, capture_output=True, check=True, text=True, timeout=_SCONTROL_SECONDS
    ).stdout


def check_rendezvous(environ: Mapping[str, str]) -> None:
    """Check that MASTER_ADDR can be resolved; otherwise the rendezvous times out after minutes.

    Raises:
        UserError: it cannot be resolved.
    """
    address = environ.get("MASTER_ADDR")
    if address is None:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        raise UserError(
            f"environment: MASTER_ADDR={address}: this name does not resolve on "
            f"{socket.gethostname()}; add --local-addr=127.0.0.1 to torchrun (several hosts: the "
            "first one's address, as launch/multinode.sh does)"
        ) from None


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """Return this process's rank (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def launched_local_rank() -> int:
    """Return this process's rank on its host (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_world_size() -> int:
    """Return the number of ranks (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_on_this_host() -> int:
    """Return the number of ranks on this host (1 without a launcher)."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "1")
    return max(1, int(given)) if re.fullmatch(r"[0-9]{1,9}", given) else 1


def is_on_one_host(environ: Mapping[str, str]) -> bool:
    """Return whether all ranks are on this host, as far as the launcher's variables show it."""
    if "RANK" not in environ or environ.get("MASTER_ADDR", "") in _LOOPBACK:
        return True
    return environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")


def listen_on_loopback(environ: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL listen on the loopback interface if all ranks are on this host.

    By default they take the interface of the host name. Variables that are set are kept. Call it
    before they are initialized.
    """
    if not is_on_one_host(environ):
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == _LOOPBACK[0] for each in addresses):
            environ.setdefault("GLOO_SOCKET_IFNAME", name)
            environ.setdefault("NCCL_SOCKET_IFNAME", name)


def print_local_ranks() -> None:
    """Print this host's ranks, once per host; nothing on a single host."""
    if launched_local_rank() != 0 or int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return
    first, count = launched_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    # Virtual nodes of SLURM share the name of their host.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(f"{ranks} of {launched_world_size()}: {host}", flush=True)


def die_with_launcher() -> None:
    """Have the kernel kill this rank when torchrun's agent dies, even by SIGKILL (Linux).

    Otherwise it would keep training unsupervised, for minutes.
    """
    if is_launched():
        die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL (Linux)."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != _FIRST_PARENT or is_orphan(os.environ):  # it died before
        os._exit(128 + signal.SIGKILL)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies; 0: none (Linux).

    The kernel keeps one number for each thread, and sends all of them.
    """
    if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PR_SET_PDEATHSIG, number)


def parent_death_signal() -> int:
    """Return what ``set_parent_death_signal`` set last in this thread."""
    number = ctypes.c_int(0)
    if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value


def identify_agent(environ: MutableMapping[str, str]) -> None:
    """Identify this process to the ranks that it will start (Linux)."""
    with suppress(OSError):
        pid = os.getpid()
        environ[_AGENT] = f"{pid} {start_ticks(pid)} {pid_namespace()}"


def is_orphan(
    environ: Mapping[str, str], parent: int | None = None, init: Path = Path("/proc/1/comm")
) -> bool:
    """Return whether torchrun started this process and has exited since.

    Known for certain with this package's rendezvous, whose agent identifies itself. Otherwise by
    the parent: process 1 adopts orphans, but in a container it may be torchrun itself.

    Args:
        environ: This process's environment; torchrun sets TORCHELASTIC_RUN_ID in it.
        parent: Pid of the parent process (default: this process's).
        init: File with the name of process 1's program.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    with suppress(OSError, ValueError):
        pid, started, namespace = environ.get(_AGENT, "").split()
        if namespace == pid_namespace():
            return str(start_ticks(int(pid))) != started
    parent = os.getppid() if parent is None else parent
    if parent != 1:
        return False
    try:
        name = init.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return False
    return name in _INIT_PROGRAMS
