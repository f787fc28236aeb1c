"""Run a function on N real gloo ranks, with a hard timeout and nothing left behind.

Children are forked from a clean server process that has torch and the trainer imported already, so
a group of four starts in well under a second and inherits no threads from pytest.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.patience import patience

fork_context = mp.get_context("forkserver")


def choose_imports_of_server() -> None:
    """Have the fork server import what ranks need; call it when all modules are imported.

    There is one server per process and one list for it, which jepa_dist.data.loader sets, too, when
    it is imported: then each rank would import the trainer by itself, for seconds.
    """
    torch_parts = ["torch.distributed.fsdp", "torch.distributed.tensor"]
    fork_context.set_forkserver_preload(
        [
            *torch_parts,
            "jepa_dist.training.assemble",
            "hypothesis",
            "pytest",
            "tests.support.frozen",
        ]
    )


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list:
    """Call ``fn(rank, world_size, *args)`` on every rank; return the results in rank order.

    ``fn`` must live at module level. The default process group (gloo) exists while it runs.
    Raises RuntimeError with the traceback of the first failing rank, or on timeout.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork_context.Process(
                target=_worker, args=(fn, rank, world_size, folder, args), daemon=False
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, time.monotonic() + patience(timeout))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"{r}.ok").read_bytes()) for r in range(world_size)]


def _wait(processes: list, folder: str, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        _raise_first_failure(processes, folder)
        if time.monotonic() > deadline:
            raise RuntimeError("ranks did not finish in time")
        time.sleep(0.02)
    _raise_first_failure(processes, folder)


def _raise_first_failure(processes: list, folder: str) -> None:
    """Report a rank ended by a signal before the ranks that failed because of it."""
    if not any(process.exitcode for process in processes):
        return
    # What failed because of it may be seen to have ended first.
    deadline = time.monotonic() + patience(1)
    while not any((process.exitcode or 0) < 0 for process in processes):
        if time.monotonic() > deadline or not any(process.is_alive() for process in processes):
            break
        time.sleep(0.02)
    failed = [(process.exitcode, rank) for rank, process in enumerate(processes)]
    failed = sorted((code > 0, rank, code) for code, rank in failed if code)
    _, rank, code = failed[0]
    reports = [Path(folder) / f"{rank}.{kind}" for kind in ("error", "crash")]
    texts = [report.read_text() for report in reports if report.exists()]
    text = "\n".join(filter(None, texts)) or "died without a traceback"
    raise RuntimeError(f"rank {rank} exited {code}:\n{text}")


def _worker(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    from jepa_dist.parallel.gloo import use_one_worker

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    use_one_worker()
    # Of a crash: the native stacks on stderr, the Python stacks in a file for _raise_first_failure.
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    crash = open(Path(folder) / f"{rank}.crash", "w")  # noqa: SIM115 - open until the process ends
    faulthandler.enable(crash)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=patience(60)),
        )
        result = fn(rank, world_size, *args)
        (Path(folder) / f"{rank}.ok").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
