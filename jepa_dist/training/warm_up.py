"""Compile every graph that a run will need before its first step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch

from jepa_dist.config import Config
from jepa_dist.data.loader import make_batch
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.parallel.communication import without_communication
from jepa_dist.plan import StepPlan, sample_shape
from jepa_dist.process.failure import killed_compiler
from jepa_dist.training.step import TrainStep
from jepa_dist.training.stopping import StopSignals
from jepa_dist.training.times import Times

# The thread that receives signals may run after the compiler has exited.
_SIGNAL_SECONDS = 0.5


class NoWarmUp:
    """The warm-up of a run that compiles graphs when they are first needed."""

    def run(self, say: Callable[[str], None]) -> bool:
        """Return True: training may begin."""
        return True


class WarmUp(NoWarmUp):
    """Compilation of every graph; weights, optimizer, data position and generators stay unchanged.

    Where ranks of a host can share the compiler's cache, one of them fills it while the others
    wait.
    """

    def __init__(self, config: Config, step: TrainStep, stops: StopSignals, times: Times) -> None:
        self._config = config
        self._step = step
        self.stops = stops
        self._times = times

    def run(self, say: Callable[[str], None]) -> bool:
        """Compile; return False if a stop was requested meanwhile. Collective."""
        say("compiling (a minute or so, seconds once the cache is filled)")
        fills_cache = self._step.state.world.fills_compile_cache()
        for is_first_turn in (True, False):
            for phase, weight in itertools.product(*_variants(self._config)):
                if self.stops.is_asked():  # where the others wait
                    return False
                if is_first_turn == fills_cache:
                    self._compile_unless_stopped(phase, weight)
        if self.stops.is_asked():
            return False
        self._step.instruments.compiles.after_warm_up()
        self._times.startup.done("warm_up")
        return True

    def _compile_unless_stopped(self, phase: int, jepa_weight: float) -> None:
        """Compile; return early if a signal ended the compiler and this rank received it, too
        (Ctrl-C reaches all processes of a terminal).
        """
        try:
            self.compile(phase, jepa_weight)
        except Exception as error:
            if killed_compiler(error) is None:
                raise
            time.sleep(_SIGNAL_SECONDS)
            if not self.stops.is_received:
                raise

    def compile(self, phase: int, jepa_weight: float) -> None:
        """Run forward and backward on a batch of zeros, and forward without gradient as in
        validation; on this rank alone."""
        state, config, size = self._step.state, self._config, self._step.layout.micro_size
        rows = np.zeros((size, config.model.seq_len + 1), dtype=np.int64)
        batch = make_batch(rows, range(size), size).to(state.world.device)
        shape = sample_shape(config) if jepa_weight else None
        samples = None if shape is None else np.ones(shape, dtype=np.int64)
        plan = StepPlan.for_warm_up(phase, jepa_weight, samples)
        for index in state.schedule.micro_batches(1):
            with without_communication(state.root):
                loss, _ = self._step.loss(batch, plan, index)
                loss.backward()
                state.schedule.release()
                state.optimizer.zero_grad()
                with torch.no_grad():
                    state.root(batch.tokens, batch.targets, batch.weight, phase=phase)
                state.schedule.release()


def _variants(config: Config) -> tuple[list[int], list[float]]:
    """Return the recurrence phases and JEPA weights (off, on) that the run will use."""
    first = [1] if config.train.loop_phase2_at > 0 else []
    phases = [0, *first, LAST_PHASE] if config.model.num_loops > 0 else [0]
    return phases, [0.0, config.jepa.lambda_] if config.jepa.lambda_ > 0 else [0.0]
