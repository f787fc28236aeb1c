"""Parts of ``bench gpu`` that need no model: collectives, links, memory, host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from jepa_dist.bench.common import milliseconds, synchronize
from jepa_dist.bench.session import Measured, Session
from jepa_dist.doctor.probes import matmul_tflops
from jepa_dist.parallel.world import World

_MIB, _GIB = 2**20, 2**30
# Devices of one kind differ by a few percent.
_STRAGGLER = 0.9
# Fewer than CUDA's launch queue holds (1,024), so that the host does not block.
_LAUNCHES = 500


def collectives(session: Session) -> Measured:
    """Run every collective that training uses and check its result.

    Raises:
        RuntimeError: a collective returned a wrong result.
    """
    world, device = session.world, session.device
    began = time.perf_counter()
    ranks, rank, group = world.world_size, world.rank, world.mesh.get_group()
    mine = torch.full((ranks,), float(rank), device=device)
    everyone = torch.arange(ranks, dtype=torch.float32, device=device)
    total = everyone.sum()

    reduced = mine.clone()
    dist.all_reduce(reduced)
    _check("all_reduce", reduced, total.expand(ranks))
    gathered = torch.empty(ranks, device=device)
    dist.all_gather_into_tensor(gathered, mine[:1].clone(), group=group)
    _check("all_gather", gathered, everyone)
    scattered = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(scattered, mine, group=group)
    _check("reduce_scatter", scattered, total[None])
    exchanged = torch.empty(ranks, device=device)
    ones = [1] * ranks
    _wait(dist.all_to_all_single(exchanged, mine, ones, ones, group=group, async_op=True))
    _check("all_to_all", exchanged, everyone)
    # Muon's exchange sends nothing to some ranks.
    empty, none = mine.new_empty(0), [0] * ranks
    _wait(dist.all_to_all_single(empty, empty.clone(), none, none, group=group, async_op=True))
    metrics = torch.ones(3, dtype=torch.float64, device=device)
    _wait(dist.all_reduce(metrics, async_op=True))
    _check("all_reduce of float64", metrics, torch.full_like(metrics, ranks))
    said = (world.any(True), world.gather(rank), world.run_on_main(lambda: "spoken"))
    if said != (True, list(range(ranks)), "spoken"):
        raise RuntimeError(f"control group: it returned {said}")
    synchronize(device)
    versions = {"backend": dist.get_backend(), **_libraries(world)}
    notes = [", ".join(f"{name} {value}" for name, value in versions.items())]
    return Measured({"all of them s": time.perf_counter() - began}, versions, notes=notes)


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


def _check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        raise RuntimeError(f"{what}: got {found.tolist()}, expected {expected.tolist()}")


def _libraries(world: World) -> dict[str, str]:
    if world.device.type != "cuda":
        return {}
    return {
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": str(torch.backends.cudnn.version()),
        "device": torch.cuda.get_device_name(world.device),
    }


def stragglers(session: Session) -> Measured:
    """Time the same matrix product on all devices at once; a slow one slows every step."""
    world = session.world
    speeds = world.gather(matmul_tflops(world))
    median = statistics.median(speeds)
    figures = {"matmul, median TFLOP/s": median, "matmul, slowest of median": min(speeds) / median}
    # Without GPUs the ranks share the cores, so that their speeds are not comparable.
    off = slow_ranks(speeds) if world.device.type == "cuda" else []
    return Measured(figures, {"tflops": speeds}, off)


def slow_ranks(speeds: Sequence[float]) -> list[str]:
    """Return a line for each rank that is much slower than the median.

    Args:
        speeds: TFLOP/s by rank.
    """
    median = statistics.median(speeds)
    return [
        f"rank {rank}: matmul at {speed:.3g} TFLOP/s, {speed / median:.0%} of the median "
        f"{median:.3g}; expected at least {_STRAGGLER:.0%}; check its clocks, temperature and "
        "other processes (nvidia-smi)"
        for rank, speed in enumerate(speeds)
        if speed < _STRAGGLER * median
    ]


def bandwidth(session: Session) -> Measured:
    """Measure the bus bandwidth of each collective over message sizes, as nccl-tests does."""
    world = session.world
    sizes = [_MIB // 16, _MIB] if session.small else [_MIB << (2 * i) for i in range(6)]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, (call_for, factor) in _COLLECTIVES.items():
        rows[name] = {}
        for size in sizes:
            call = call_for(size // 4 // world.world_size, world)
            dist.barrier(group=world.control)
            ms = milliseconds(call, world.device, 3 if session.small else 10)
            ms = max(world.gather(ms))  # the same on every rank
            share = factor * (1 - 1 / world.world_size)
            rows[name][str(size)] = {"ms": ms, "GB/s": share * size / ms / 1e6}
    small, large = str(sizes[0]), str(sizes[-1])
    figures = {f"{name} GB/s": of_size[large]["GB/s"] for name, of_size in rows.items()}
    figures[f"all_reduce of {sizes[0] // 1024} KiB ms"] = rows["all_reduce"][small]["ms"]
    notes = [
        f"{name}: "
        + ", ".join(
            f"{row['GB/s']:.3g} GB/s at {int(size) / _MIB:g} MiB" for size, row in of.items()
        )
        for name, of in rows.items()
    ]
    return Measured(figures, {"by_bytes": rows}, notes=notes)


def _all_reduce(numel: int, world: World) -> Callable[[], object]:
    tensor = torch.zeros(numel * world.world_size, device=world.device)
    return lambda: dist.all_reduce(tensor)


def _all_gather(numel: int, world: World) -> Callable[[], object]:
    shard, whole = _shard_and_whole(numel, world)
    return lambda: dist.all_gather_into_tensor(whole, shard)


def _reduce_scatter(numel: int, world: World) -> Callable[[], object]:
    shard, whole = _shard_and_whole(numel, world)
    return lambda: dist.reduce_scatter_tensor(shard, whole)


def _all_to_all(numel: int, world: World) -> Callable[[], object]:
    _, source = _shard_and_whole(numel, world)
    target = torch.empty_like(source)
    return lambda: dist.all_to_all_single(target, source)


def _shard_and_whole(numel: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    shard = torch.zeros(numel, device=world.device)
    return shard, torch.zeros(numel * world.world_size, device=world.device)


# By name: a function that prepares the call for a number of float32 elements per rank, and the
# number of passes over the bus.
_COLLECTIVES: dict[str, tuple[Callable[[int, World], Callable[[], object]], int]] = {
    "all_reduce": (_all_reduce, 2),
    "all_gather": (_all_gather, 1),
    "reduce_scatter": (_reduce_scatter, 1),
    "all_to_all": (_all_to_all, 1),
}


def copies(session: Session) -> Measured:
    """Measure memory bandwidth: device copy, compiled elementwise kernel, copy to the host."""
    device = session.device
    numel = _MIB if session.small else _GIB // 2
    source = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / 1e6
    figures = {"copy GB/s": moved / milliseconds(lambda: target.copy_(source), device)}
    rows = source.view(-1, 2048)
    compiled = torch.compile(lambda x: F.leaky_relu(x, 0.5).square(), dynamic=False)
    figures["compiled kernel GB/s"] = moved / milliseconds(lambda: compiled(rows), device)
    if device.type == "cuda":
        figures |= _host_copies(source)
    return Measured(figures, {"gigabytes": source.nbytes / 1e9})


def _host_copies(source: torch.Tensor) -> dict[str, float]:
    began = time.perf_counter()
    page_locked = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    seconds = time.perf_counter() - began
    call = lambda: page_locked.copy_(source, non_blocking=True)  # noqa: E731
    ms = milliseconds(call, source.device, repeat=3)
    return {
        "to page-locked memory GB/s": source.nbytes / 1e6 / ms,
        "page-locking GB/s": source.nbytes / 1e9 / seconds,
    }


def launches(session: Session) -> Measured:
    """Measure the host time to launch a kernel from Python."""
    device = session.device
    x = torch.zeros(16, device=device)
    left, right = x[:4, None].contiguous(), x[None, :4].contiguous()
    calls: dict[str, Callable[[], object]] = {
        "add_ us": lambda: x.add_(1),
        "mm us": lambda: left @ right,
    }
    figures = {}
    for name, call in calls.items():
        for _ in range(10):
            call()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(_LAUNCHES):
            call()
        figures[name] = 1e6 * (time.perf_counter() - began) / _LAUNCHES
        synchronize(device)
    return Measured(figures)
