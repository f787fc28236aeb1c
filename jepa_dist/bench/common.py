"""Helpers of the benchmarks: machine, tables, configuration, data, interleaved timing, ranks."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jepa_dist.config import Config, load
from jepa_dist.data.shards import write_shard
from jepa_dist.errors import UserError
from jepa_dist.parallel.gloo import use_one_worker
from jepa_dist.process.dist_env import is_launched

# ---------------------------------------------------------------------------- output


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": devices or "none",
    }


def versions() -> dict[str, Any]:
    """Return the versions of Python, torch and CUDA."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; cells are formatted by ``str``."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


# ---------------------------------------------------------------------------- configuration


def add_config(parser: argparse.ArgumentParser, default: str = "configs/debug.yaml") -> None:
    """Add the options that select a configuration; ``chosen_config`` reads them."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(default),
        help="configuration to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="changes to it, e.g. model.num_layers=8",
    )


def chosen_config(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the command line and the environment.

    Raises:
        UserError: the configuration is invalid.
    """
    return load(arguments.config, arguments.set).config


def with_random_data(config: Config, folder: Path, sequences: int | None = None) -> Config:
    """Return the same configuration on shards of random ids, written into ``folder``.

    Args:
        config: The configuration.
        folder: Folder for the shards and the run directory.
        sequences: Number of training sequences (default: four global batches).
    """
    count = 4 * config.batch.sequences if sequences is None else sequences
    generator = np.random.Generator(np.random.PCG64(config.seed))
    for split, rows in (("train", count), ("val", config.batch.sequences)):
        ids = generator.integers(0, config.model.vocab_size, rows * config.model.seq_len + 1)
        write_shard(folder / f"{split}_0.bin", ids, config.model.vocab_size)
    data: dict[str, Any] = {
        "train": str(folder / "train_*.bin"),
        "val": str(folder / "val_*.bin"),
        "stages": [],
        "tokenizer": None,
    }
    if config.model.document_mask:
        data["bos_id"] = 0  # random ids begin documents of random lengths
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(folder / "run")}),
            "data": config.data.model_copy(update=data),
        }
    )


# ---------------------------------------------------------------------------- timing


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every call, interleaved (A B C A B C) so that drift affects all.

    With a process group, all ranks start each call together. There are no warm-up calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(call: Callable[[], object], device: torch.device, repeat: int = 10) -> float:
    """Return the mean milliseconds of ``repeat`` consecutive calls, after three warm-up calls.

    On CUDA they are timed by events on the device, without synchronizing between the calls.
    """
    for _ in range(3):
        call()
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return 1e3 * (time.perf_counter() - start) / repeat
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / repeat


# ---------------------------------------------------------------------------- ranks


def refuse_launcher(bench: str) -> None:
    """Raise under a launcher, for benchmarks that start their ranks themselves.

    Raises:
        UserError: this process is one rank of several already.
    """
    if is_launched():
        raise UserError(f"bench {bench}: starts its ranks itself; run it without torchrun")


def on_ranks(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Call ``fn(device, *args)`` in ``ranks`` new processes; return the results in rank order.

    Each is a rank of the default process group (NCCL and gloo on CUDA, gloo on CPU), as a launcher
    would start it, and has its share of the cores. All have exited when this returns or raises.

    Args:
        fn: A module-level function (it is pickled by name); returns JSON data.
        ranks: Number of processes.
        *args: Picklable arguments.
        timeout: Seconds after which the processes are killed.

    Raises:
        UserError: they took longer, or there are fewer CUDA devices than ranks.
    """
    devices = torch.cuda.device_count()
    if devices and ranks > devices:
        raise UserError(f"{ranks} ranks: this machine has {devices} CUDA device(s)")
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + timeout
        shared = (ranks, folder, timeout, fn, args)
        # Not daemons, because a rank starts loader processes.
        context = spawn(_rank, shared, nprocs=ranks, join=False)
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{ranks} ranks did not finish in {timeout:g} s; give them more time "
                        "(--timeout) or less to do"
                    )
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [
            json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]


def _rank(
    rank: int, ranks: int, folder: str, timeout: float, fn: Callable[..., Any], args: Any
) -> None:
    # torch.multiprocessing makes the kernel send SIGINT when the parent dies: exit immediately.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    else:
        use_one_worker()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
        device_id=device if is_cuda else None,
    )
    result = fn(device, *args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # releases semaphores
    sys.stdout.flush()
    # gloo's threads occasionally abort a normal exit ("terminate called ...", torch 2.11).
    os._exit(0)
