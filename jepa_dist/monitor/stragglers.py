"""Which rank is slow: the same computation timed on every rank, before anybody waits for another.

A step takes as long on every rank, since each waits for all in the step's collectives; its time
says nothing about who is slow. So one region of the model that every rank computes alike and that
waits for nobody is timed on its own: the head with the loss, the last and often the largest piece
of the forward pass. It holds no parameters of its own, so FSDP2 has no hooks on it, and when it
runs everything is gathered. Its time rides on the step's metrics reduction: every rank adds its
own to a vector that is zero elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_KEY = "compute/rank_"
# Medians over fewer steps say little, and a busy moment may spoil a record.
_LEAST_STEPS = 10
_RECORDS_IN_ROW = 3


class RankTimes:
    """Times a region on this rank and compares the ranks' times.

    Args:
        rank: This one.
        hosts: Host of every rank; with fewer than two ranks nothing is measured.
        device: On CUDA the region is timed there, by events that nobody waits for.
    """

    def __init__(self, rank: int, hosts: Sequence[str], device: torch.device) -> None:
        self._rank = rank
        self._hosts = hosts if len(hosts) > 1 else ()
        self._timer = _CudaTimer() if device.type == "cuda" else _HostTimer()
        self._steps: list[list[float]] = []

    def around(self, region: nn.Module) -> nn.Module:
        """The same region, timed; to be called in its place."""
        return _Timed(region, self._timer) if self._hosts else region

    def host_sums(self) -> dict[str, float]:
        """This rank's seconds for one call of the region, to be added up over ranks."""
        sums = {f"{_KEY}{rank}": 0.0 for rank in range(len(self._hosts))}
        if self._hosts:
            sums[f"{_KEY}{self._rank}"] = self._timer.seconds()
        return sums

    def observe(self, values: Mapping[str, float]) -> None:
        """Take in the sums of a step."""
        seconds = [values[f"{_KEY}{rank}"] for rank in range(len(self._hosts))]
        if seconds and all(second > 0 for second in seconds):
            self._steps.append(seconds)

    def record(self) -> dict[str, Any]:
        """Each rank's median over the steps since the last result, and the slowest rank against
        the others; nothing until there are enough steps."""
        if len(self._steps) < _LEAST_STEPS:
            return {}
        steps, self._steps = self._steps, []
        medians = [statistics.median(of_rank) for of_rank in zip(*steps, strict=True)]
        slowest = max(range(len(medians)), key=medians.__getitem__)
        spread = statistics.pstdev(medians)
        excess = medians[slowest] - statistics.fmean(medians)
        return {
            "straggler/slowest_rank": slowest,
            "straggler/host": self._hosts[slowest],
            # The lower of the two in the middle: of two ranks, the faster one.
            "straggler/ratio": medians[slowest] / statistics.median_low(medians),
            "straggler/zscore": excess / spread if spread > 0 else 0.0,
        }


class StragglerAlarm:
    """Warns of a rank that stays slow; once, and again only after none was.

    Args:
        ratio: Slow is a rank that takes so many times as long as a typical one; 0 warns never.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._suspect = -1
        self._in_row = 0

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Take in a record, in order; the warnings that it gives rise to."""
        if "straggler/ratio" not in record:
            return []
        rank, ratio = record["straggler/slowest_rank"], record["straggler/ratio"]
        if not 0 < self._ratio <= ratio:
            self._in_row = 0
            return []
        self._in_row = self._in_row + 1 if rank == self._suspect else 1
        self._suspect = rank
        if self._in_row != _RECORDS_IN_ROW:
            return []
        return [
            f"step {record['step']}: rank {rank} (host {record['straggler/host']}) takes "
            f"{ratio:.2f} times as long as a typical rank for the same computation, and all wait "
            "for it. Look on that host for other processes and for clocks that are held down "
            "(nvidia-smi -q -d PERFORMANCE), or leave the host out"
        ]


class _Timed(nn.Module):
    """Calls a region, and times the calls that train."""

    def __init__(self, region: nn.Module, timer: _HostTimer | _CudaTimer) -> None:
        super().__init__()
        self.region = region
        self._timer = timer

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.region(*args)
        stop = self._timer.start()
        result = self.region(*args)
        stop()
        return result


class _HostTimer:
    """Seconds by the host's clock: on a CPU the call is the work."""

    def __init__(self) -> None:
        self._calls: list[float] = []

    def start(self) -> Callable[[], None]:
        began = time.perf_counter()
        return lambda: self._calls.append(time.perf_counter() - began)

    def seconds(self) -> float:
        """Mean of the calls since it was last asked for."""
        calls, self._calls = self._calls, []
        return statistics.fmean(calls) if calls else 0.0


class _CudaTimer:
    """Seconds by the device's clock, of the calls that the device is done with."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._last = 0.0

    def start(self) -> Callable[[], None]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()

        def stop() -> None:
            end.record()
            self._pending.append((begin, end))

        return stop

    def seconds(self) -> float:
        """Mean of the calls that ended since it was last asked for; if none did, as before."""
        calls = []
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            calls.append(begin.elapsed_time(end) / 1000)
        self._last = statistics.fmean(calls) if calls else self._last
        return self._last
