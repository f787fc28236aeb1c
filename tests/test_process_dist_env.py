"""The launcher's environment: adopted if complete, rejected in one line if not."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import (
    adopt_launcher,
    check_rendezvous,
    identify_agent,
    is_orphan,
    ranks_on_this_host,
)
from jepa_dist.process.identity import pid_namespace
from tests.support.commands import TORCHRUN as TORCHRUN_COMMAND
from tests.support.commands import Command

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "123",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "MASTER_ADDR": "10.0.0.1",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_variables_of_torchrun_are_adopted_unchanged() -> None:
    environ = dict(TORCHRUN)
    adopt_launcher(environ)
    assert environ == TORCHRUN
    both = {**SRUN, **TORCHRUN}
    adopt_launcher(both)
    assert both["RANK"] == "1", "torchrun inside of a job step"


def test_srun_s_variables() -> None:
    environ = dict(SRUN)
    adopt_launcher(environ)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environ[name] for name in names] == ["5", "1", "8", "10.0.0.1", "20125"]


def test_tasks_on_one_node_meet_at_the_loopback_address() -> None:
    environ = without(SRUN, "MASTER_ADDR") | {"SLURM_STEP_NUM_NODES": "1"}
    adopt_launcher(environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_without_a_launcher(environ: dict[str, str]) -> None:
    """Also in the shell of a SLURM allocation, outside of srun."""
    adopt_launcher(environ)
    assert "RANK" not in environ


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set, but RANK is not"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK='', but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PO"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing"),
        (without(TORCHRUN, "MASTER_PORT"), "but MASTER_PORT is missing"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one': expected a number"),
        ({**TORCHRUN, "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2': expected a number"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "but SLURM_LOCALID, SLURM_JOB_ID, SLURM_STE"),
        (without(SRUN, "SLURM_LOCALID"), "but SLURM_LOCALID is missing"),
        (without(SRUN, "MASTER_ADDR"), "set MASTER_ADDR to the first node's"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "many"}, "SLURM_NTASKS='many': expected"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE='2' is set, but RANK is not: mpir"),
    ],
)
def test_incomplete(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        adopt_launcher(dict(environ))
    (problem,) = caught.value.problems
    assert message in problem


def test_a_check_accepts_the_number_of_ranks() -> None:
    environ = {"WORLD_SIZE": "32"}
    adopt_launcher(environ, will_meet=False)
    with pytest.raises(UserError, match="WORLD_SIZE='x': expected a number"):
        adopt_launcher({"WORLD_SIZE": "x"}, will_meet=False)


def test_a_rendezvous_that_does_not_resolve() -> None:
    check_rendezvous({})
    check_rendezvous(TORCHRUN)
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid: .*--local-addr"):
        check_rendezvous({"MASTER_ADDR": "no-such-host.invalid"})


@pytest.mark.parametrize(
    ("parent", "elastic", "init", "orphan"),
    [
        (1, True, "torchrun", False),  # a container whose first process is torchrun
        (1, True, "python3.11", False),
        (1, True, "systemd", True),
        (1, True, "tini", True),
        (1, True, "bash", True),
        (1, False, "tini", False),  # a container that starts one rank
        (7, True, "systemd", False),
        (1, True, None, False),
    ],
)
def test_orphans_are_distinguished_from_children_of_process_one(
    tmp_path: Path, parent: int, elastic: bool, init: str | None, orphan: bool
) -> None:
    if init is not None:
        (tmp_path / "comm").write_text(f"{init}\n")
    environ = {"TORCHELASTIC_RUN_ID": "x"} if elastic else {}
    assert is_orphan(environ, parent, tmp_path / "comm") is orphan


def test_an_agent_that_identified_itself_is_known_by_its_process(tmp_path: Path) -> None:
    """Whichever process adopts orphans: here the program of process 1 is unknown."""
    init = tmp_path / "comm"
    init.write_text("unheard-of\n")
    environ = {"TORCHELASTIC_RUN_ID": "x"}
    identify_agent(environ)
    assert not is_orphan(environ, 1, init)
    noted = environ["TORCHRUN_PROCESS"]
    pid, started, namespace = noted.split()
    with subprocess.Popen(["true"]) as ended:
        pass
    environ["TORCHRUN_PROCESS"] = f"{ended.pid} {started} {namespace}"
    assert is_orphan(environ, 1, init)
    environ["TORCHRUN_PROCESS"] = f"{pid} {int(started) - 1} {namespace}"  # its pid was reused
    assert is_orphan(environ, 7, init)
    del environ["TORCHELASTIC_RUN_ID"]
    assert not is_orphan(environ, 1, init)


@pytest.mark.parametrize("noted", ["", "1", "1 2 another", "x y {namespace}", "1 2 3 4"])
def test_an_invisible_agent_is_checked_through_the_parent(tmp_path: Path, noted: str) -> None:
    (tmp_path / "comm").write_text("tini\n")
    noted = noted.format(namespace=pid_namespace())
    environ = {"TORCHELASTIC_RUN_ID": "x", "TORCHRUN_PROCESS": noted}
    assert is_orphan(environ, 1, tmp_path / "comm")
    assert not is_orphan(environ, 7, tmp_path / "comm")


_LATE = """
import os, sys, time
from pathlib import Path
parent, folder = os.getppid(), Path(sys.argv[1])
(folder / "started").touch()
while os.getppid() == parent:
    time.sleep(0.05)
from jepa_dist.process.dist_env import die_with_launcher
die_with_launcher()
(folder / "outlived").touch()
"""


@pytest.mark.slow
def test_a_rank_whose_torchrun_died_during_its_imports_ends(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(_LATE)
    one = [word.replace("node=2", "node=1") for word in TORCHRUN_COMMAND]
    with Command([*one, script, tmp_path]) as command:
        command.wait_for((tmp_path / "started").exists, 60)
        command.signal(signal.SIGKILL)
        command.wait(60)
    assert not (tmp_path / "outlived").exists()


@pytest.mark.parametrize("given", ["0", "", "-1", "8(x2)", "9" * 5000, "\u0663"])
def test_an_invalid_number_of_local_ranks_counts_as_one(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", given)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert ranks_on_this_host() == 1
