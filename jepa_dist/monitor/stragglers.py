"""Detection of slow ranks: time the same computation on every rank, without communication.

A step takes equally long on every rank, since all wait for the slowest one in the step's
collectives; step times do not show which rank is slow. Therefore one region of the model that
contains no communication is timed separately: the head with the loss, the last and often the
largest part of the forward pass. It has no parameters of its own, so FSDP2 adds no hooks to it, and
all parameters are gathered when it runs. The times are exchanged in the step's metrics reduction:
every rank adds its own to a vector that is zero elsewhere.
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
# Medians over fewer steps are noisy, and a transient load may affect a single record.
_LEAST_STEPS = 10
_CONSECUTIVE_RECORDS = 3


class RankTimes:
    """Timer of a region on this rank, and comparison of all ranks' times.

    Args:
        rank: This rank.
        hosts: Host of every rank; with fewer than two ranks nothing is measured.
        device: On CUDA the region is timed on the device, by events, without synchronization.
    """

    def __init__(self, rank: int, hosts: Sequence[str], device: torch.device) -> None:
        self._rank = rank
        self._hosts = hosts if len(hosts) > 1 else ()
        self._timer = _CudaTimer() if device.type == "cuda" else _HostTimer()
        self._steps: list[list[float]] = []

    def around(self, region: nn.Module) -> nn.Module:
        """Return a module that times ``region``; call it in its place."""
        return _Timed(region, self._timer) if self._hosts else region

    def host_sums(self) -> dict[str, float]:
        """Return this rank's seconds per call of the region, to be summed over ranks."""
        sums = {f"{_KEY}{rank}": 0.0 for rank in range(len(self._hosts))}
        if self._hosts:
            sums[f"{_KEY}{self._rank}"] = self._timer.seconds()
        return sums

    def observe(self, values: Mapping[str, float]) -> None:
        """Record the sums of a step."""
        seconds = [values[f"{_KEY}{rank}"] for rank in range(len(self._hosts))]
        if seconds and all(second > 0 for second in seconds):
            self._steps.append(seconds)

    def record(self) -> dict[str, Any]:
        """Return metrics that compare the slowest rank with the others, from each rank's median
        over the steps since the last result; empty until there are enough steps."""
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
            # The low median, so that with two ranks the slower is compared with the faster one.
            "straggler/ratio": medians[slowest] / statistics.median_low(medians),
            "straggler/zscore": excess / spread if spread > 0 else 0.0,
        }


class StragglerAlarm:
    """Alarm for a rank that is slow in consecutive records; fires once and re-arms when no rank is.

    Args:
        ratio: Time relative to the median from which a rank is slow; 0 disables the alarm.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._suspect = -1
        self._consecutive = 0

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Process the next record; return its warnings."""
        if "straggler/ratio" not in record:
            return []
        rank, ratio = record["straggler/slowest_rank"], record["straggler/ratio"]
        if not 0 < self._ratio <= ratio:
            self._consecutive = 0
            return []
        self._consecutive = self._consecutive + 1 if rank == self._suspect else 1
        self._suspect = rank
        if self._consecutive != _CONSECUTIVE_RECORDS:
            return []
        return [
            f"step {record['step']}: rank {rank} (host {record['straggler/host']}) takes "
            f"{ratio:.2f} times as long as a typical rank for the same computation, and all wait "
            "for it. Check that host for other processes and for throttled clocks "
            "(nvidia-smi -q -d PERFORMANCE), or exclude the host"
        ]


class _Timed(nn.Module):
    """A region whose calls with gradients enabled are timed."""

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
    """Timer by the host's clock, for synchronous execution on a CPU."""

    def __init__(self) -> None:
        self._calls: list[float] = []

    def start(self) -> Callable[[], None]:
        began = time.perf_counter()
        return lambda: self._calls.append(time.perf_counter() - began)

    def seconds(self) -> float:
        """Return the mean over the calls since the last query."""
        calls, self._calls = self._calls, []
        return statistics.fmean(calls) if calls else 0.0


class _CudaTimer:
    """Timer by CUDA events, for calls that the device has completed."""

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
        """Return the mean over the calls completed since the last query; if none, the last mean."""
        calls = []
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            calls.append(begin.elapsed_time(end) / 1000)
        self._last = statistics.fmean(calls) if calls else self._last
        return self._last
