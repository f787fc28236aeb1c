"""One plan per step: rank 0 makes it, and all other ranks receive it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from jepa_dist.config import Config
from jepa_dist.parallel.world import start_world
from jepa_dist.plan import PlanChannel, Planner, StepPlan, TrainingClock
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config


class Clock(TrainingClock):
    """A clock that is set by hand."""

    now = 0.0

    def seconds(self) -> float:
        return self.now


def plans(config: Config, steps: int) -> list[StepPlan]:
    planner = Planner(config, Clock())
    return [planner.plan(step) for step in range(steps)]


def test_curriculum(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__steps=20, jepa__start_frac=0.25, jepa__ramp_frac=0.5)
    weights = [plan.jepa_weight for plan in plans(config, 20)]
    assert weights[:6] == [0.0] * 6
    np.testing.assert_allclose(weights[5:15], 0.1 * np.arange(10) / 10, atol=1e-12)
    np.testing.assert_allclose(weights[15:], 0.1)
    for plan in plans(config, 20):
        assert (plan.samples is not None) == (plan.jepa_weight > 0)


def test_phases_logging_and_end(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__steps=20, train__log_every=3, eval__every=8)
    made = plans(config, 20)
    assert [plan.phase for plan in made] == [0] * 6 + [1] * 6 + [2] * 8
    assert [p.step for p in made if p.evaluate] == [7, 15, 19]
    assert [p.step for p in made if p.log] == [2, 5, 7, 8, 11, 14, 15, 17, 19]
    assert [p.step for p in made if p.last] == [19]


def test_wall_clock_drives_all_schedules(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__max_wallclock_seconds=100, jepa__start_frac=0.5)
    clock = Clock()
    planner = Planner(config, clock)
    seen = []
    for step, clock.now in enumerate((0, 29, 31, 49, 51, 61, 90, 99.9, 100.1)):
        seen.append(planner.plan(step))
    assert [plan.phase for plan in seen] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [plan.jepa_weight > 0 for plan in seen] == [False] * 4 + [True] * 5
    assert seen[6].lr_multiplier == pytest.approx((1 - 0.9) / 0.667)
    assert [plan.last for plan in seen] == [False] * 8 + [True]


def test_the_clock_stands_still_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 16.0, 18.0])  # start, pause, end of the pause, reading
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = TrainingClock()
    with clock.paused():
        pass
    assert clock.seconds() == 3.0


def test_pack_and_unpack(tmp_path: Path) -> None:
    for plan in plans(tiny_config(tmp_path, jepa__start_frac=0.5, jepa__spans_per_sequence=2), 20):
        again = StepPlan.unpack(plan.pack((6, 2, 2)), (6, 2, 2))
        for field in dataclasses.fields(StepPlan):
            ours, expected = getattr(again, field.name), getattr(plan, field.name)
            assert np.array_equal(ours, expected) if field.name == "samples" else ours == expected


def receive(rank: int, world_size: int, config: Config) -> tuple[list[StepPlan], list[bool]]:
    """Return the plans that a rank receives, and whether each broadcast was asynchronous."""
    plain, broadcasts = dist.broadcast, []

    def counted(*args, **options):
        broadcasts.append(options.get("async_op", False))
        return plain(*args, **options)

    dist.broadcast = counted
    channel = PlanChannel(config, start_world(config.parallel), TrainingClock())
    received = []
    channel.request(0)
    for step in range(20):
        received.append(channel.take())
        if step < 19:
            channel.request(step + 1)
    return received, broadcasts


def test_every_rank_receives_the_same_plan(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    expected = plans(config, 20)
    for received, broadcasts in run_ranks(receive, 3, config):
        assert broadcasts == [True] * 20  # one a step, and none that is waited for at once
        for ours, plan in zip(received, expected, strict=True):
            assert ours.step == plan.step
            assert ours.phase == plan.phase
            assert np.array_equal(ours.samples, plan.samples)
