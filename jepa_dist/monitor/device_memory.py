"""Advice and a memory snapshot when the device runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from jepa_dist.errors import UserError

# Number of newest allocations that are recorded with their stacks.
_EVENTS = 100_000


@contextmanager
def explain_out_of_memory(run_dir: Path, rank: int, *, snapshot: bool) -> Iterator[None]:
    """Turn an out-of-memory error into advice, and write a snapshot of the allocations.

    Open the snapshot ``RUN/profile/memory_rank_<r>.pickle`` on pytorch.org/memory_viz. (It is
    PyTorch's own pickle format; this package never reads it.)

    Args:
        run_dir: The run.
        rank: This rank.
        snapshot: Record allocations with their stacks, and write a snapshot at the end, too.

    Raises:
        UserError: the device is out of memory.
    """
    is_cuda = torch.cuda.is_available()
    if snapshot and is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
    try:
        yield
    except torch.OutOfMemoryError as error:
        left = _write_snapshot(run_dir, rank) if is_cuda else None
        raise UserError(*_advice(error, left)) from error
    if snapshot and is_cuda:
        _write_snapshot(run_dir, rank)


def _write_snapshot(run_dir: Path, rank: int) -> Path | None:
    path = run_dir / "profile" / f"memory_rank_{rank}.pickle"
    with suppress(OSError, RuntimeError):  # must not hide the out-of-memory error
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    return None


def _advice(error: torch.OutOfMemoryError, snapshot: Path | None) -> list[str]:
    happened = str(error).partition("\n")[0]
    lines = [
        f"out of device memory: {happened}",
        "reduce memory: lower batch.micro (the global batch stays the same), set "
        "parallel.activation_checkpointing=selective (full saves most), or shard over more ranks "
        "(parallel.dp_shard)",
    ]
    if snapshot is not None:
        lines.append(f"snapshot of allocations: {snapshot} (open it on pytorch.org/memory_viz)")
    return lines
