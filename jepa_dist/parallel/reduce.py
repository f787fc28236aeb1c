"""What ranks report upward: one small reduction per step, read on the host only when asked.

Nothing here waits for the device except ``drain``, which logging steps call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_dist.parallel.world import World

_LIMB_BITS = 16
_LIMBS = 4


class _Pending(NamedTuple):
    step: int
    names: tuple[str, ...]
    sums: Tensor
    work: dist.Work | None
    shared: Mapping[str, Tensor]


class StepReport(NamedTuple):
    """One step's numbers, the same on every rank."""

    step: int
    values: dict[str, float]
    digest: int
    """Sum of the ranks' data digests, modulo 2**64."""


class MetricsReduction:
    """Sums every rank's numbers of a step over all ranks, asynchronously."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: list[_Pending] = []

    def submit(
        self, step: int, sums: Mapping[str, Tensor], digest: int, shared: Mapping[str, Tensor]
    ) -> None:
        """Start the reduction of one step.

        Args:
            step: Optimiser step.
            sums: Scalars on the device to be added up over ranks; the same names on every rank.
            digest: This rank's data digest, an unsigned 64-bit integer that is added up too.
            shared: Scalars that every rank already has alike (such as the gradient norm).
        """
        # 16-bit limbs: float64 adds them exactly for up to 2**37 ranks.
        limbs = [float(digest >> (_LIMB_BITS * i) & 0xFFFF) for i in range(_LIMBS)]
        local = torch.tensor(limbs, dtype=torch.float64)
        if self._world.device.type == "cuda":
            local = local.pin_memory().to(self._world.device, non_blocking=True)
        packed = torch.cat([torch.stack([value.double() for value in sums.values()]), local])
        work = None
        if self._world.world_size > 1:
            work = dist.all_reduce(packed, async_op=True)
        self._pending.append(_Pending(step, tuple(sums), packed, work, dict(shared)))

    def drain(self) -> list[StepReport]:
        """Numbers of all steps submitted since the last call; waits for the device once."""
        if not self._pending:
            return []
        for pending in self._pending:
            if pending.work is not None:
                pending.work.wait()
        rows = torch.stack([_row(pending) for pending in self._pending]).tolist()
        reports = [_report(p, row) for p, row in zip(self._pending, rows, strict=True)]
        self._pending.clear()
        return reports


def _row(pending: _Pending) -> Tensor:
    shared = [value.detach().double() for value in pending.shared.values()]
    return torch.cat([pending.sums, torch.stack(shared)]) if shared else pending.sums


def _report(pending: _Pending, row: list[float]) -> StepReport:
    count = len(pending.names)
    limbs = row[count : count + _LIMBS]
    values = dict(zip(pending.names, row[:count], strict=True))
    values |= dict(zip(pending.shared, row[count + _LIMBS :], strict=True))
    digest = sum(int(limb) << (_LIMB_BITS * i) for i, limb in enumerate(limbs)) % 2**64
    return StepReport(pending.step, values, digest)
