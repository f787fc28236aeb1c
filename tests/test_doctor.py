"""The doctor: measurements on real ranks, findings, and rejected environments."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jepa_dist.config import ParallelConfig
from jepa_dist.doctor.findings import Report, findings, table
from jepa_dist.doctor.probes import allreduce_gbps, check_files, clock_offset, ring_gbps
from jepa_dist.doctor.topology import interface_to, obstacles
from jepa_dist.parallel.world import World, start_world
from tests.slurm.cluster import Cluster, missing_programs
from tests.support.commands import TORCHRUN, Finished, run_command
from tests.support.forked import run_module
from tests.support.patience import patience
from tests.support.ranks import run_ranks
from tests.support.tiny import REPOSITORY

DOCTOR = REPOSITORY / "launch/doctor.py"


def world() -> World:
    return start_world(ParallelConfig())


# ---------------------------------------------------------------------------- judgement

VERSIONS = {"torch": "2.13.0", "nccl": "2.27.5", "device": "NVIDIA H100 80GB HBM3"}


def report(rank: int, **changes: Any) -> Report:
    """Return the report of a rank in a healthy cluster with two ranks per node."""
    healthy = Report(
        rank=rank,
        node=f"n{rank // 2}",
        versions=VERSIONS,
        interface=f"ib0 10.0.0.{rank // 2}",
        clock_ahead=0.0,
        clock_error=0.0,
        free_gib=900.0,
        files="",
        has_hidden_gpu=False,
        matmul_tflops=700.0 + rank,
        ring_gbps=44.0 - rank,
    )
    return dataclasses.replace(healthy, **changes)


def found(*changes: tuple[int, dict[str, Any]]) -> list[str]:
    """Return the findings for eight ranks, some of which have problems."""
    odd = dict(changes)
    return findings([report(rank, **odd.get(rank, {})) for rank in range(8)], "runs", 10)


def test_a_healthy_cluster() -> None:
    assert found() == []


def test_versions_that_differ() -> None:
    old = {"versions": VERSIONS | {"nccl": "2.21.5"}}
    assert found((2, old), (3, old)) == ["nccl differs: 2.27.5 on n0, n2, n3; 2.21.5 on n1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"clock_ahead": -3.25, "clock_error": 0.01},
            "n1: clock 3.2 s behind that of rank 0; set it by NTP (chronyc tracking)",
        ),
        (
            {"files": "cannot be written: Read-only file system"},
            "n1: runs: cannot be written: Read-only file system; all nodes must share it (--dir)",
        ),
        ({"free_gib": 2.5}, "n1: runs: 2.5 GiB free, less than 10 (--need-gib)"),
        (
            {"has_hidden_gpu": True},
            "n1: has a GPU that torch cannot use; compare the driver with torch's CUDA version",
        ),
    ],
)
def test_a_faulty_node_is_reported_once(changes: dict[str, Any], expected: str) -> None:
    assert found((2, changes), (3, changes)) == [expected]


def test_a_clock_that_may_be_within_the_limit_is_not_reported() -> None:
    assert found((2, {"clock_ahead": 1.4, "clock_error": 0.5})) == []


def test_slow_ranks_are_named() -> None:
    """A throttled GPU and a slow link are reported by rank and node; the usual spread is not."""
    throttled, cable = {"matmul_tflops": 412.0}, {"ring_gbps": 11.0}
    assert found((3, throttled), (6, cable)) == [
        "rank 3 on n1: matmul 412 TFLOP/s, 59% of the median 703",
        "rank 6 on n3: link 11 GB/s, 27% of the median 40.5",
    ]


def test_one_rank_has_no_links() -> None:
    alone = report(0, ring_gbps=None)
    assert findings([alone], "runs", 10) == []
    header, row = table([alone])
    assert header.split()[:5] == ["rank", "node", "torch", "nccl", "device"]
    assert row.endswith(" -")


# ---------------------------------------------------------------------------- place

TWO_NODES = {"RANK": "1", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost", "127.0.1.1", "::1"])
def test_loopback_is_refused_on_several_nodes(master: str) -> None:
    environ = {**TWO_NODES, "MASTER_ADDR": master, "GLOO_SOCKET_IFNAME": "lo"}
    (problem,) = obstacles(environ, same_machine=False)
    assert problem.startswith(f"rendezvous at {master}: a loopback address, which on each of the ")
    assert "2 nodes" in problem
    assert not list(obstacles(environ, same_machine=True))
    assert not list(obstacles({**environ, "GROUP_WORLD_SIZE": "1"}, same_machine=False))


def test_a_master_that_does_not_resolve() -> None:
    environ = {**TWO_NODES, "MASTER_ADDR": "n1.invalid", "GLOO_SOCKET_IFNAME": "lo"}
    (problem,) = obstacles(environ, same_machine=False)
    assert problem.startswith("rendezvous at n1.invalid: this name does not resolve here")


def test_a_host_name_that_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Debian's /etc/hosts gloo would listen at 127.0.1.1, unreachable from other hosts."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    (problem,) = obstacles({**TWO_NODES, "MASTER_ADDR": "192.0.2.1"}, same_machine=False)
    assert problem.startswith("host name localhost: resolves to ")
    assert "set GLOO_SOCKET_IFNAME" in problem


@pytest.mark.parametrize(
    ("value", "is_known"),
    [("lo", True), ("=lo", True), ("nothing0", False), ("nothing0,lo", True), ("^docker", True)],
)
def test_interfaces_that_are_named(value: str, is_known: bool) -> None:
    problems = list(obstacles({"NCCL_SOCKET_IFNAME": value}, same_machine=False))
    assert bool(problems) is not is_known
    if problems:
        assert problems[0].startswith(
            f"NCCL_SOCKET_IFNAME={value}: no such interface on this host; "
        )


def test_the_interface_to_the_rendezvous() -> None:
    assert interface_to("127.0.0.1", 29500) == ("lo", "127.0.0.1")
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                assert interface_to(each.address, 29500) == (name, each.address)


# ---------------------------------------------------------------------------- measurements


def _offset(rank: int, world_size: int) -> tuple[float, float]:
    shift = {1: 5.0, 2: -0.25}.get(rank, 0.0)
    return clock_offset(world(), lambda: time.time() + shift)


@pytest.mark.slow
def test_clocks_are_compared() -> None:
    offsets = run_ranks(_offset, 4)
    for (ahead, error), shift in zip(offsets, [0.0, 5.0, -0.25, 0.0], strict=True):
        assert abs(ahead - shift) <= error + 1e-3


def _files(rank: int, world_size: int, folders: list[Path]) -> str:
    return check_files(folders[rank], world(), patience=0.5)


@pytest.mark.slow
def test_a_shared_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new/runs"
    assert run_ranks(_files, 3, [folder] * 3) == ["", "", ""]
    assert list(folder.iterdir()) == [], "cleaned up"


def test_a_folder_that_one_node_does_not_share(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    own.mkdir()
    first, different, last = run_ranks(_files, 3, [shared, own, shared])
    assert (first, last) == ("", "")
    assert different.startswith("does not show what rank 0 wrote (No such file or directory)")
    assert list(own.iterdir()) == []
    assert list(shared.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problems = run_ranks(_files, 2, [tmp_path / "file"] * 2)
    assert problems[0] == "cannot be written: Not a directory"
    assert problems[1].startswith("does not show what rank 0 wrote")


def _stale(rank: int, world_size: int, folder: Path) -> str:
    """Rank 1 sees a folder of the same name with other content: a copy, or a stale cache."""
    shared, own = folder / "shared", folder / "own"
    if rank == 1:
        threading.Thread(target=_copy_badly, args=(shared, own)).start()
    return check_files(own if rank == 1 else shared, world(), patience=3)


def _copy_badly(shared: Path, own: Path) -> None:
    while not (written := list(shared.glob(".doctor-*/rank_0"))):
        time.sleep(0.01)
    copy = own / written[0].relative_to(shared)
    copy.parent.mkdir(parents=True)
    copy.write_text("what was there before")


def test_a_folder_with_other_content(tmp_path: Path) -> None:
    assert run_ranks(_stale, 2, tmp_path) == ["", "has other content than rank 0 wrote"]


def _speed(rank: int, world_size: int) -> tuple[float | None, float | None]:
    here = world()
    return allreduce_gbps(here), ring_gbps(here, stride=1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_links_are_measured_on_several_ranks(world_size: int) -> None:
    for bandwidth, ring in run_ranks(_speed, world_size):
        if world_size == 1:
            assert (bandwidth, ring) == (None, None)
        else:
            assert bandwidth is not None
            assert ring is not None
            assert bandwidth > 0
            assert ring > 0


# ---------------------------------------------------------------------------- the command


def off(finished: Finished) -> list[str]:
    """Return the findings except on speed, since this machine may be busy."""
    problems = re.findall(r"^problem: (.*)", finished.output, re.MULTILINE)
    assert finished.code == (1 if problems else 0), finished.output
    return [line for line in problems if not re.search(r": (matmul|link) ", line)]


def doctor(*arguments: object, **environ: object) -> Finished:
    return run_module("jepa_dist.doctor", "--need-gib", 0, *arguments, environ=environ, timeout=200)


@pytest.mark.slow
def test_alone_on_this_machine(tmp_path: Path) -> None:
    finished = doctor("--dir", tmp_path)
    assert (finished.code, off(finished)) == (0, [])
    assert "ok: no problems found" in finished.output


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    import torch

    finished = doctor("--dir", tmp_path, CUDA_VISIBLE_DEVICES=0)
    assert off(finished) == []
    row = finished.output.splitlines()[1]
    assert torch.cuda.get_device_name(0) in row
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    assert re.search(rf"  {torch.version.cuda}  +\d+\.\d+(\.\d+)?  +{re.escape(nccl)}  ", row)


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    finished = run_command(*TORCHRUN, DOCTOR, "--dir", tmp_path, "--need-gib", 0, timeout=200)
    assert off(finished) == []
    lines = [line for line in finished.output.splitlines() if not line.startswith("W")]
    assert lines[0].split()[:3] == ["rank", "node", "python"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "all-reduce over 2 ranks: " in finished.output


def test_a_full_disk_ends_with_code_1(tmp_path: Path) -> None:
    finished = doctor("--dir", tmp_path, "--need-gib", 1e9)
    assert finished.code == 1
    assert "1 problem(s) found:" in finished.output
    assert re.search(r"problem: .*GiB free, less than 1e\+09 \(--need-gib\)", finished.output)


def test_loopback_is_refused_before_the_rendezvous(tmp_path: Path) -> None:
    """Two nodes in torchrun's environment variables; the other one need not exist."""
    environ = {
        **{"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": "lo"},
    }
    finished = doctor("--dir", tmp_path, **environ)
    assert finished.code == 1
    assert "rendezvous at 127.0.0.1: a loopback address" in finished.output
    assert finished.output.count("problem: ") == 1


@pytest.mark.slow
def test_nodes_with_different_folders(tmp_path: Path) -> None:
    """Three processes as srun starts them, of which the last has runs on a disk of its own."""
    (tmp_path / "own").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int, folder: str) -> subprocess.Popen[str]:
        step = {"SLURM_STEP_ID": 0, "SLURM_JOB_ID": 1, "SLURM_STEP_NUM_TASKS": 3}
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_NODES": 3}
        place = {"SLURMD_NODENAME": f"n{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = {name: str(value) for name, value in {**step, **task, **place}.items()}
        return subprocess.Popen(
            [sys.executable, DOCTOR, "--same-machine", "--need-gib=0", "--dir", tmp_path / folder],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    processes = [start(rank, "own" if rank == 2 else "shared") for rank in range(3)]
    try:
        outputs = [process.communicate(timeout=patience(250))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [1, 1, 1], outputs
    problems = [line for line in outputs[0].splitlines() if line.startswith("problem: n")]
    assert len(problems) == 1
    assert problems[0].startswith(
        f"problem: n2: {tmp_path}/shared: does not show what rank 0 wrote"
    )
    assert outputs[1:] == ["", ""]


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
def test_under_srun(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tasks on each of two nodes of a real SLURM, which meet at the first node's address."""
    # Not in tmp_path, whose name is too long for sockets where TMPDIR is.
    with Cluster(tmp_path_factory.mktemp("srun") / "cluster", nodes=2) as cluster:
        step = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, DOCTOR]
        arguments = ["--same-machine", "--need-gib=0", f"--dir={tmp_path / 'runs'}"]
        command = ["bash", "-c", '"$@"; echo "code $?"', "_", *step, *arguments]
        output = cluster.run(*command, timeout=250)
    rows = [line.split() for line in output.splitlines()]
    assert [row[:2] for row in rows[1:5]] == [["0", "n1"], ["1", "n1"], ["2", "n2"], ["3", "n2"]]
    code = 0 if "ok: no problems found" in output else 1
    assert f"code {code}" in output


def test_help() -> None:
    finished = run_command(sys.executable, DOCTOR, "--help")
    assert finished.code == 0
    assert "srun --ntasks-per-node=8 jepa_dist doctor" in finished.output
