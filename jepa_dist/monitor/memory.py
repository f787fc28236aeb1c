"""What fills the device's memory, above all when there is none left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from jepa_dist.errors import UserError

# Allocations kept with their stacks; the newest.
_EVENTS = 100_000


@contextmanager
def memory_watched(run_dir: Path, rank: int, *, snapshot: bool) -> Iterator[None]:
    """Turns running out of device memory into advice, and leaves a snapshot of what is allocated.

    The snapshot ``RUN/profile/memory_rank_<r>.pickle`` opens on pytorch.org/memory_viz. (It is a
    pickle of PyTorch's own; nothing here reads it.)

    Args:
        run_dir: The run.
        rank: This rank.
        snapshot: Record allocations with their stacks, and leave a snapshot at the end, too.

    Raises:
        UserError: no memory left.
    """
    is_cuda = torch.cuda.is_available()
    if snapshot and is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
    try:
        yield
    except torch.OutOfMemoryError as error:
        left = _leave_snapshot(run_dir, rank) if is_cuda else None
        raise UserError(*_advice(error, left)) from error
    if snapshot and is_cuda:
        _leave_snapshot(run_dir, rank)


def _leave_snapshot(run_dir: Path, rank: int) -> Path | None:
    path = run_dir / "profile" / f"memory_rank_{rank}.pickle"
    with suppress(OSError, RuntimeError):  # what happened matters more than a file about it
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    return None


def _advice(error: torch.OutOfMemoryError, snapshot: Path | None) -> list[str]:
    happened = str(error).partition("\n")[0]
    lines = [
        f"out of device memory: {happened}",
        "take less at a time: lower batch.micro (the global batch stays the same), or set "
        "parallel.activation_checkpointing=selective (full needs least), or shard over more ranks "
        "(parallel.dp_shard)",
    ]
    if snapshot is not None:
        lines.append(f"what was allocated: {snapshot} (open it on pytorch.org/memory_viz)")
    return lines
