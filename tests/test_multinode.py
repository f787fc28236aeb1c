"""launch/multinode.sh: its command, rejected arguments, and a run of two agents on this host."""

from __future__ import annotations

import shlex
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.commands import Command, Finished, environment_of, listening, run_command
from tests.support.tiny import REPOSITORY, write_corpus
from tests.support.train_command import last_step, settings

SCRIPT = REPOSITORY / "launch/multinode.sh"


def multinode(*arguments: object, **environ: object) -> Finished:
    return run_command(
        "bash", SCRIPT, *arguments, cwd=Path("/"), environ={"VENV": sys.prefix, **environ}
    )


def planned(*arguments: object, **environ: object) -> list[str]:
    """Return the command of a dry run, as words."""
    finished = multinode("--dry-run", *arguments, **environ)
    assert finished.code == 0, finished.output
    (line,) = finished.output.splitlines()
    return shlex.split(line)


def test_dry_run() -> None:
    verbatim = "run.dir=my 'run' $(touch trace) `touch trace`; *"
    words = planned("--nodes", 8, "--head", "h1", "--min-nodes", 4, "x.yaml", verbatim)
    for word in (
        "--nnodes=4:8",
        "--nproc-per-node=1",
        "--rdzv-endpoint=h1:29500",
    ):
        assert word in words
    assert words[-4:] == ["-m", "jepa_dist.train", "x.yaml", verbatim]
    assert "is_host" not in " ".join(words), "left to torchrun, which compares names"


def test_the_first_of_numbered_hosts_keeps_the_rendezvous() -> None:
    def conf(rank: int) -> str:
        words = planned("--nodes", 2, "--head", "h1", "--node-rank", rank, "x.yaml")
        (found,) = [word for word in words if word.startswith("--rdzv-conf=")]
        return found

    assert conf(0).endswith(",is_host=1")
    assert conf(1).endswith(",is_host=0")


def test_ranks_and_threads() -> None:
    def of(**environ: object) -> tuple[str, str]:
        words = planned("--nodes", 2, "--head", "h1", "x.yaml", **environ)
        (ranks,) = [word for word in words if word.startswith("--nproc-per-node=")]
        return ranks.partition("=")[2], words[1]

    assert of(NPROC_PER_NODE=3, OMP_NUM_THREADS=5) == ("3", "OMP_NUM_THREADS=5")
    assert of(CUDA_VISIBLE_DEVICES="0,3")[0] == "2"
    assert of(CUDA_VISIBLE_DEVICES="")[0] == "1"
    assert of(NPROC_PER_NODE=999, OMP_NUM_THREADS="") == ("999", "OMP_NUM_THREADS=1")


def test_what_a_slurm_job_would_run() -> None:
    """Real jobs: tests/slurm."""
    script = REPOSITORY / "slurm/jepa_8node.sh"
    arguments = ["--nodes=4", "--dry-run", "configs/gpt_1b.yaml", "jepa.lambda=0.02"]
    environ = {"SLURM_JOB_ID": "", "SLURM_GPUS_ON_NODE": 8, "MIN_NODES": "", "VENV": sys.prefix}
    finished = run_command("bash", script, *arguments, cwd=Path("/"), environ=environ)
    assert finished.code == 0, finished.output
    lines = [line for line in finished.output.splitlines() if not line.startswith(("#", "SBATCH"))]
    submit, check, train = (shlex.split(line) for line in lines)
    assert submit == ["sbatch", "--nodes=4", str(script), *arguments[2:]]
    config = ["configs/gpt_1b.yaml", "run.dir=runs/gpt_1b-JOB", "jepa.lambda=0.02"]
    assert check[-5:] == ["jepa_dist.train", *config, "--check"]
    assert "WORLD_SIZE=32" in check
    assert {"srun", "--nodes=4", "--ntasks=4", "--no-kill", "--gpus-per-node=8"} <= set(train)
    agent = train[train.index("agent") :]
    assert agent[:5] == ["agent", "--nodes", "4", "--min-nodes", "2"]
    assert agent[-3:] == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "h1", "x.yaml"], "--nodes: missing; expected the number of hosts"),
        (["--nodes", "2", "x.yaml"], "--head: missing; expected the name or address"),
        (["--nodes", "2", "--head", "h1"], "CONFIG: missing; expected e.g. configs/debug.yaml"),
        (["--nodes", "2", "--head", "h1", "seed=1"], "CONFIG: missing"),
        (["--nodes", "two", "--head", "h1", "x.yaml"], "--nodes two: expected a number of hosts"),
        (["--nodes", "2", "--min-nodes", "3", "--head", "h", "x"], "--min-nodes 3: more than"),
        (
            ["--nodes", "2", "--head", "localhost", "x.yaml"],
            "--head localhost: other hosts cannot reach",
        ),
        (
            ["--nodes", "2", "--head", "127.0.0.1", "x.yaml"],
            "--head 127.0.0.1: other hosts cannot reach",
        ),
        (["--node", "2"], "--node: unknown option"),
        (["--nodes"], "--nodes: a value is missing"),
        (["--nodes", "2", "--head", "no-such-host.invalid", "x"], "no-such-host.invalid: not rea"),
    ],
)
def test_user_errors(arguments: list[str], message: str) -> None:
    finished = multinode(*arguments)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_port_in_use_is_reported_at_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        finished = multinode("--nodes", 1, "--head", "127.0.0.1", "--port", port, "x.yaml")
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: --port {port}: is in use on this host")


def ranks_of(host: Command) -> list[psutil.Process]:
    return [process for process in host.processes() if "RANK" in environment_of(process)]


@pytest.mark.slow
def test_a_stop_on_one_host_saves_and_stops_all(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "run"
    command = [
        *("bash", SCRIPT, "--nodes", 2, "--head", "127.0.0.1", "--port", port, "--same-machine"),
        *settings(tmp_path, train__steps=1_000_000),
    ]
    environ = {"VENV": sys.prefix}
    with Command(command, environ=environ) as one, Command(command, environ=environ) as other:
        one.wait_for(lambda: last_step(run_dir) >= 3, 200)
        addresses = listening([*one.processes(), *other.processes()])
        one.signal(signal.SIGINT)
        stopped = one.wait(200)
        # Its torchrun waits up to five minutes for the other one and ignores signals meanwhile.
        other.wait_for(lambda: not ranks_of(other), 200)
        both = stopped.output + other.output()
    assert addresses == {"127.0.0.1"}, "the interface that --head selects, alone"
    assert stopped.code == 128 + signal.SIGINT, stopped.output
    assert stopped.output.endswith("the ranks were stopped (SIGINT)\n")
    assert f"stopped after step {last_step(run_dir)} with a checkpoint" in both
    assert sorted(line for line in both.splitlines() if " of 2: " in line) == [
        f"rank {rank} of 2: {socket.gethostname()}" for rank in range(2)
    ]
    assert "Traceback" not in both
