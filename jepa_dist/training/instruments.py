"""Measurements of a step besides its loss, all behind one interface.

A new instrument is a class here and a line in ``assemble``. Its metrics come in three ways: device
scalars are contributed to the step's single reduction over ranks (``contributions``), host numbers
likewise (``host_contributions``), and numbers of this rank alone go directly into the record
(``record``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from jepa_dist.monitor.clipped import ClippedShare
from jepa_dist.monitor.compiles import CompileCounter
from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.monitor.stragglers import RankTimes
from jepa_dist.objectives.joint import JointModel, Watch
from jepa_dist.objectives.probe import TapProbe
from jepa_dist.optim.histograms import Distribution, distributions
from jepa_dist.optim.update_ratio import UpdateRatio
from jepa_dist.parallel.reduce import StepReport
from jepa_dist.parallel.world import World
from jepa_dist.plan import StepPlan
from jepa_dist.training.listeners import Publisher
from jepa_dist.training.records import (
    KindOfStep,
    compiled_graphs,
    kinds_of_work,
    mean_flops,
    memory,
    mfu,
)
from jepa_dist.training.saving import Saving
from jepa_dist.training.stopping import StopSignals

T = TypeVar("T")


class Instrument:
    """A measurement of steps. Hooks are called on every rank; the default ones do nothing.

    A step calls ``begin``, ``before_update``, ``contributions`` and ``host_contributions`` in this
    order. Its report comes back to ``observe`` some steps later. Logged steps call ``record``.
    """

    def begin(self, plan: StepPlan) -> None:
        """Note that a step begins."""

    def before_update(self, plan: StepPlan) -> None:
        """Inspect the clipped gradients and the weights before the update."""

    def contributions(self) -> Mapping[str, Tensor]:
        """Return device scalars to be summed over ranks; the same names on all ranks."""
        return {}

    def host_contributions(self) -> Mapping[str, float]:
        """Return host numbers to be summed likewise."""
        return {}

    def observe(self, report: StepReport) -> None:
        """Process a step's numbers, in order of steps."""

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return metrics for a logged step; ``values`` are its sums over ranks."""
        return {}


class Speed(Instrument):
    """Tokens per second, seconds by phase, and the share of the device's peak."""

    def __init__(self, meter: StepTimer, saving: Saving, root: JointModel, world: World) -> None:
        self._meter = meter
        self._saving = saving
        self._root = root
        self._world = world
        self._steps: Counter[KindOfStep] = Counter()
        """Number of steps since the last record by kind: kinds differ in FLOPs."""

    def begin(self, plan: StepPlan) -> None:
        """Start the step's timer."""
        self._meter.step(plan.step, saving=self._saving.in_flight, times_communication=plan.log)
        self._steps[KindOfStep(plan.phase, plan.is_objective_on)] += 1

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return means over the steps since the last record."""
        steps, self._steps = self._steps, Counter()
        speed = self._meter.lap()
        flops = mean_flops(self._root.config, self._root.objective.flops_per_token, steps)
        return {**speed, **mfu(speed["tokens_per_second"] * flops, self._world)}


class StopRequests(Instrument):
    """The signals that ranks have received; ``Segment`` acts on the sums."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def host_contributions(self) -> Mapping[str, float]:
        """Return this rank's signals."""
        return self._signals.host_contributions()


class Probe(Instrument):
    """The objective's diagnostics, in the steps that the plan selects; the passes call it."""

    def __init__(self, tap: TapProbe) -> None:
        self._tap = tap
        self._sums: dict[str, Tensor] = {}

    def watcher(self, tokens_BT: Tensor, num_rows: int) -> Watch:
        """Return the function to pass a micro-batch's tapped states to: ``TapProbe.watch``."""
        return lambda states: self._tap.watch(states, tokens_BT, num_rows)

    def measure(self) -> None:
        """Measure the watched states; call after every backward."""
        self._sums |= self._tap.measure()

    def contributions(self) -> Mapping[str, Tensor]:
        """Return the step's numbers; empty if nothing was watched."""
        sums, self._sums = self._sums, {}
        return sums

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return ``jepa/*`` metrics."""
        return self._tap.metrics(values) if plan.probe else {}


class Histograms(Instrument):
    """Histograms of parameters and gradients every ``every`` steps (0: never), for TensorBoard."""

    def __init__(self, named_parameters: Mapping[str, Tensor], every: int) -> None:
        self._named_parameters = named_parameters
        self._every = every
        self._taken: dict[str, Distribution] = {}

    def before_update(self, plan: StepPlan) -> None:
        """Count, in the steps in which it is due. Collective."""
        is_due = self._every > 0 and (plan.step + 1) % self._every == 0
        self._taken = distributions(self._named_parameters.items()) if is_due else {}

    def publish(self, publisher: Publisher, step: int) -> None:
        """Publish the counts of the last step, if it counted."""
        if self._taken:
            publisher.histograms(self._taken, step)


class UpdateRatios(Instrument):
    """Size of logged steps' updates relative to the weights, by parameter group."""

    def __init__(self, groups: Mapping[str, Iterable[Tensor]]) -> None:
        self._ratio = UpdateRatio(groups)

    def before_update(self, plan: StepPlan) -> None:
        """Keep a sample of the weights."""
        if plan.log:
            self._ratio.before()

    def contributions(self) -> Mapping[str, Tensor]:
        """Return the squared norms of update and weights."""
        return self._ratio.after()

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return ``update_ratio/*``."""
        return self._ratio.metrics(values)


class Clipping(Instrument):
    """The share of steps whose gradient was clipped."""

    def __init__(self, max_norm: float) -> None:
        self._share = ClippedShare(max_norm)

    def observe(self, report: StepReport) -> None:
        """Count whether the step was clipped."""
        self._share.observe(report.values["grad_norm"])

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return the share over the steps since the last record."""
        return self._share.record()


class Stragglers(Instrument):
    """Each rank's time for the same computation; needs at least two ranks."""

    def __init__(self, times: RankTimes) -> None:
        self._times = times

    def host_contributions(self) -> Mapping[str, float]:
        """Return this rank's seconds."""
        return self._times.host_sums()

    def observe(self, report: StepReport) -> None:
        """Process all ranks' seconds."""
        self._times.observe(report.values)

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return ``straggler/*`` once enough steps were timed."""
        return self._times.record()


class Compiles(Instrument):
    """Numbers of compiled graphs and of recompilations."""

    def __init__(self) -> None:
        self._counter = CompileCounter()

    def after_step(self, plan: StepPlan) -> None:
        """Count after a step and its evaluation."""
        self._counter.observe(compiled_graphs(), kinds_of_work(plan))

    def after_warm_up(self) -> None:
        """Count after everything was compiled."""
        self._counter.observe(compiled_graphs(), {"train", "jepa", "evaluate"})

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return both numbers of this rank."""
        return {
            "compile/graphs": compiled_graphs(),
            "compile/recompiles": self._counter.recompiles,
        }


class Memory(Instrument):
    """Memory of this rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return ``memory/*`` in GiB."""
        return memory(self._device)


@dataclass(frozen=True)
class Instruments(Instrument):
    """All instruments as one, in order; those that are also called by name are named."""

    probe: Probe
    histograms: Histograms
    compiles: Compiles
    everything: Sequence[Instrument]
    """All of them, including the named ones."""

    def begin(self, plan: StepPlan) -> None:
        """Call ``begin`` of every instrument."""
        for instrument in self.everything:
            instrument.begin(plan)

    def before_update(self, plan: StepPlan) -> None:
        """Call ``before_update`` of every instrument."""
        for instrument in self.everything:
            instrument.before_update(plan)

    def contributions(self) -> Mapping[str, Tensor]:
        """Return every instrument's device scalars."""
        return _merged(instrument.contributions() for instrument in self.everything)

    def host_contributions(self) -> Mapping[str, float]:
        """Return every instrument's host numbers."""
        return _merged(instrument.host_contributions() for instrument in self.everything)

    def observe(self, report: StepReport) -> None:
        """Call ``observe`` of every instrument."""
        for instrument in self.everything:
            instrument.observe(report)

    def record(self, plan: StepPlan, values: Mapping[str, float]) -> Mapping[str, Any]:
        """Return every instrument's metrics for a logged step."""
        return _merged(instrument.record(plan, values) for instrument in self.everything)


def _merged(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}
