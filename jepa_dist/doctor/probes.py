"""Measurements made by all ranks together; every function here is collective unless noted."""

from __future__ import annotations

import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from jepa_dist.parallel.world import World

_PINGS = 10
# On a network file system, files written by another node may become visible late.
_VISIBLE_WITHIN_SECONDS = 30.0


def clock_offset(world: World, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """Return by how many seconds this node's clock is ahead of rank 0's, and the maximum error.

    The ranks query rank 0's time one after the other; of several replies, the one with the shortest
    round trip is used (Cristian's algorithm).
    """
    best = (0.0, float("inf")) if world.rank else (0.0, 0.0)
    for asking in range(1, world.world_size):
        for _ in range(_PINGS):
            if world.rank == asking:
                best = min(best, _ask(world, clock), key=lambda answer: answer[1])
            elif world.is_main:
                _answer(world, asking, clock)
    return best


def _ask(world: World, clock: Callable[[], float]) -> tuple[float, float]:
    answer = torch.zeros(1, dtype=torch.float64)
    before = clock()
    dist.send(answer, dst=0, group=world.control)
    dist.recv(answer, src=0, group=world.control)
    after = clock()
    return (before + after) / 2 - answer.item(), (after - before) / 2


def _answer(world: World, rank: int, clock: Callable[[], float]) -> None:
    question = torch.zeros(1, dtype=torch.float64)
    dist.recv(question, src=rank, group=world.control)
    dist.send(torch.tensor([clock()], dtype=torch.float64), dst=rank, group=world.control)


def free_gib(folder: Path) -> float:
    """Return the free space, in GiB, on the file system of a folder, which need not exist yet. (Not
    collective.)"""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free / 2**30


def check_files(folder: Path, world: World, patience: float = _VISIBLE_WITHIN_SECONDS) -> str:
    """Check that all ranks read and write the same files in ``folder``.

    Rank 0 writes a token that every rank reads; every rank writes one that rank 0 reads.

    Returns:
        The problem with this rank's view of the folder; empty if there is none.
    """
    name = world.run_on_main(lambda: f".doctor-{secrets.token_hex(8)}")
    mine = folder / name / f"rank_{world.rank}"
    problem = _write_token(mine, name) if world.is_main else ""
    dist.barrier(group=world.control)
    if not world.is_main:
        problem = _read(folder / name / "rank_0", name, patience) or _write(mine, name)
    known = world.gather(problem)
    unread = world.run_on_main(lambda: _read_all(folder / name, known, name, patience))
    if world.is_main:
        shutil.rmtree(folder / name, ignore_errors=True)
    return problem or unread[world.rank]


def _write_token(path: Path, token: str) -> str:
    try:
        path.parent.mkdir(parents=True)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return _write(path, token)


def _write(path: Path, token: str) -> str:
    try:
        path.write_text(token, encoding="utf-8")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _read(path: Path, token: str, patience: float) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            found = path.read_text(encoding="utf-8")
            if found == token:
                return ""
            problem = "has other content than rank 0 wrote"
        except OSError as error:
            problem = f"does not show what rank 0 wrote ({error.strerror}): not the same folder"
        if time.monotonic() > deadline:
            return problem
        time.sleep(0.1)


def _read_all(folder: Path, known: list[str], token: str, patience: float) -> list[str]:
    """Return rank 0's problem with each rank's file; skips ranks that have a problem already, and
    waits for the full ``patience`` at most once."""
    problems = []
    for rank, problem in enumerate(known):
        missing = not problem and _read(folder / f"rank_{rank}", token, patience)
        problems.append("rank 0 does not see what it wrote" if missing else "")
        patience = 0.0 if missing else patience
    return problems


# ---------------------------------------------------------------------------- speed


def matmul_tflops(world: World) -> float:
    """Return the speed of a matrix product while all ranks compute one, in TFLOP/s: bf16 on CUDA,
    float32 on CPU."""
    on_gpu = world.device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.randn(size, size, device=world.device).to(dtype)
    seconds = _median_seconds(lambda: matrix @ matrix, world, repeat=200 if on_gpu else 50)
    return 2 * size**3 / seconds / 1e12


def allreduce_gbps(world: World) -> float | None:
    """Return the bus bandwidth of an all-reduce over all ranks in GB/s (2 (n-1)/n * bytes / time,
    as in nccl-tests); None for one rank."""
    if world.world_size == 1:
        return None
    tensor = torch.zeros(_num_floats(world, mib=256), device=world.device)
    seconds = _median_seconds(lambda: dist.all_reduce(tensor), world, repeat=20)
    return 2 * (1 - 1 / world.world_size) * tensor.nbytes / seconds / 1e9


def ring_gbps(world: World, stride: int) -> float | None:
    """Return the receive bandwidth from rank - stride, in GB/s, while every rank sends to
    rank + stride; unlike an all-reduce's, it differs between ranks. None for one rank."""
    if world.world_size == 1:
        return None
    outgoing = torch.zeros(_num_floats(world, mib=64), device=world.device)
    incoming = torch.empty_like(outgoing)
    after = (world.rank + stride) % world.world_size
    before = (world.rank - stride) % world.world_size

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, after),
            dist.P2POp(dist.irecv, incoming, before),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return outgoing.nbytes / _median_seconds(exchange, world, repeat=20) / 1e9


def _num_floats(world: World, mib: int) -> int:
    return (mib if world.device.type == "cuda" else mib // 16) * 2**20 // 4


def _median_seconds(work: Callable[[], object], world: World, repeat: int) -> float:
    """Return the median time of ``repeat`` simultaneous calls on all ranks, after three warm-up
    calls."""
    for _ in range(3):
        work()
    _finish(world)
    dist.barrier(group=world.control)
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        _finish(world)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
