"""Metrics reduction: one small asynchronous all-reduce per step; only logged steps wait for it.

A step's numbers form one float64 row on the device: first values to be summed over ranks, then
values that are identical on all ranks. The row is reduced and copied to the host asynchronously;
``arrived`` returns the completed rows, ``drain`` waits for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_dist.parallel.world import World

_LIMB_BITS = 16
_LIMBS = tuple(f"digest_{i}" for i in range(4))


class StepReport(NamedTuple):
    """One step's numbers, the same on every rank."""

    step: int
    values: dict[str, float]
    digest: int
    """Sum of the ranks' data digests, modulo 2**64."""


@dataclass
class _Pending:
    step: int
    names: tuple[str, ...]
    row: Tensor
    work: dist.Work | None
    event: torch.cuda.Event | None

    def has_arrived(self) -> bool:
        if self.event is not None:
            return self.event.query()
        return self.work is None or self.work.is_completed()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()

    def report(self) -> StepReport:
        values = dict(zip(self.names, self.row.tolist(), strict=True))
        limbs = [int(values.pop(name)) for name in _LIMBS]
        digest = sum(limb << (_LIMB_BITS * i) for i, limb in enumerate(limbs))
        return StepReport(self.step, values, digest % 2**64)


class MetricsReduction:
    """Asynchronous sums of each step's numbers over all ranks, returned in order of steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: deque[_Pending] = deque()

    def submit(
        self,
        step: int,
        sums: Mapping[str, Tensor],
        host_sums: Mapping[str, float],
        digest: int,
        shared: Mapping[str, Tensor],
    ) -> None:
        """Start the reduction of a step's numbers.

        Args:
            step: Optimizer step.
            sums: Scalars on the device, summed over ranks; the same names on every rank.
            host_sums: Numbers on the host, summed likewise.
            digest: This rank's data digest, an unsigned 64-bit integer, summed modulo 2**64.
            shared: Scalars that are identical on every rank (such as the gradient norm).
        """
        # 16-bit limbs: float64 adds them exactly for up to 2**37 ranks.
        limbs = [float(digest >> (_LIMB_BITS * i) & 0xFFFF) for i in range(len(_LIMBS))]
        host = torch.tensor([*host_sums.values(), *limbs], dtype=torch.float64)
        row = torch.cat([_stack(sums), self._to_device(host), _stack(shared)])
        names = (*sums, *host_sums, *_LIMBS, *shared)
        work = None
        if self._world.world_size > 1:
            work = dist.all_reduce(row[: len(names) - len(shared)], async_op=True)
        self._pending.append(self._to_host(_Pending(step, names, row, work, event=None)))

    def arrived(self) -> list[StepReport]:
        """Return the reports of the oldest steps that are complete; does not wait."""
        reports = []
        while self._pending and self._pending[0].has_arrived():
            reports.append(self._pending.popleft().report())
        return reports

    def drain(self) -> list[StepReport]:
        """Return the reports of all steps not returned yet; waits for the device."""
        for pending in self._pending:
            pending.wait()
        return self.arrived()

    def _to_device(self, host: Tensor) -> Tensor:
        if self._world.device.type == "cpu":
            return host
        return host.pin_memory().to(self._world.device, non_blocking=True)

    def _to_host(self, pending: _Pending) -> _Pending:
        """Queue the copy to the host after the reduction; on a CPU there is nothing to copy."""
        if self._world.device.type == "cpu":
            return pending
        if pending.work is not None:
            pending.work.wait()  # the stream waits, not the host
        row = torch.empty(pending.row.shape, dtype=torch.float64, pin_memory=True)
        row.copy_(pending.row, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Pending(pending.step, pending.names, row, None, event)


def _stack(scalars: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.detach().double() for value in scalars.values()])
