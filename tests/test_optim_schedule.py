"""Learning-rate schedules against their closed forms, and where a cool-down branch begins."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jepa_dist.config import Config, load, to_dict
from jepa_dist.config.schema import OptimConfig, ScheduleConfig
from jepa_dist.errors import UserError
from jepa_dist.optim.schedule import lr_multiplier, rate_multiplier

FRACS = [n / 1000 for n in range(1001)]


def multipliers(min_lr: float = 0.0, **schedule: Any) -> list[float]:
    optim = OptimConfig(min_lr=min_lr, warmdown_frac=0.5)
    return [rate_multiplier(frac, ScheduleConfig(**schedule), optim) for frac in FRACS]


@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_the_default_is_the_reference_bit_for_bit(min_lr: float) -> None:
    assert multipliers(min_lr) == [lr_multiplier(frac, 0.5, min_lr) for frac in FRACS]


def test_warm_up_is_linear_from_zero() -> None:
    found = multipliers(kind="wsd", warmup_frac=0.1, decay_frac=0.0)
    assert found == pytest.approx([min(frac / 0.1, 1.0) for frac in FRACS], abs=1e-12)
    assert found[0] == 0.0
    warmed = multipliers(warmup_frac=0.1)
    assert warmed[100:] == multipliers()[100:]
    assert warmed[50] == pytest.approx(0.5)


@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_cosine(min_lr: float) -> None:
    found = multipliers(min_lr, kind="cosine", warmup_frac=0.2)
    for frac, value in zip(FRACS, found, strict=True):
        if frac < 0.2:
            assert value == pytest.approx(frac / 0.2)
        else:
            half = math.cos(math.pi / 2 * (frac - 0.2) / 0.8) ** 2  # (1 + cos 2x) / 2
            assert value == pytest.approx(min_lr + (1 - min_lr) * half, abs=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt"])
def test_wsd(shape: str, min_lr: float) -> None:
    found = multipliers(min_lr, kind="wsd", warmup_frac=0.05, decay_frac=0.25, decay_shape=shape)
    for frac, value in zip(FRACS, found, strict=True):
        left = (1 - frac) / 0.25
        falls = left if shape == "linear" else 1 - (1 - left) ** 0.5 if left < 1 else 1.0
        expected = frac / 0.05 if frac < 0.05 else min_lr + (1 - min_lr) * min(falls, 1.0)
        assert value == pytest.approx(expected, abs=1e-7)
    assert found[-1] == pytest.approx(min_lr)


def test_a_run_beyond_its_end_stays_at_the_end() -> None:
    for kind in ("warmdown", "cosine", "wsd"):
        schedule = ScheduleConfig(kind=kind, decay_shape="one_minus_sqrt")
        assert rate_multiplier(1.3, schedule, OptimConfig(min_lr=0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.decay_from=now"], "schedule.decay_from=now: schedule.kind=warmdown has no"),
        (["schedule.kind=cosine", "schedule.decay_from=0.5"], "schedule.kind=cosine has no decay"),
        (
            ["schedule.kind=wsd", "schedule.warmup_frac=0.5", "schedule.decay_frac=0.6"],
            "must add up to at most 1",
        ),
        (["schedule.kind=cosine", "schedule.warmup_frac=1"], "must be below 1"),
        (["schedule.kind=wsd", "schedule.decay_from=later"], "schedule.decay_from"),
    ],
)
def test_invalid_schedules_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(None, overrides)


class TestBranch:
    """Cool-down branches: ``checkpoint.resume=PATH schedule.decay_from=now``."""

    def config(self, *overrides: str) -> Config:
        wsd = ["schedule.kind=wsd", "schedule.warmup_frac=0.1", "train.steps=30"]
        return load(None, [*wsd, *overrides]).config

    def branch(self, config: Config, step: int, before: Config) -> Config:
        from jepa_dist.run.progress import Progress, RunState
        from jepa_dist.start.resume import Start, _decay_from

        state = RunState(Progress(step=step, seconds=step / 2), to_dict(before), "data", None)
        start = _decay_from(config, state)
        return Start(None, step, 0.0, False, (), start).resolve(config)

    def rates(self, config: Config, first: int) -> list[float]:
        from jepa_dist.plan import Planner, TrainingClock

        planner = Planner(config, TrainingClock())
        return [planner.plan(step).lr_multiplier for step in range(first, config.train.steps)]

    def test_equals_a_run_with_the_same_decay_from(self) -> None:
        now = self.config("schedule.decay_from=now", "checkpoint.resume=runs/a")
        branch = self.branch(now, 21, self.config("train.steps=1000"))
        uninterrupted = self.config(f"schedule.decay_from={21 / 30}")
        assert self.rates(branch, 21) == self.rates(uninterrupted, 21)
        assert self.rates(uninterrupted, 0)[3:22] == [1.0] * 19
        assert self.rates(branch, 21)[-1] == pytest.approx(1 / 9)

    def test_continues_its_own_decay(self) -> None:
        now = self.config("schedule.decay_from=now", "checkpoint.resume=runs/a")
        branch = self.branch(now, 21, self.config())
        again = self.config("schedule.decay_from=now")  # checkpoint.resume=auto
        assert self.branch(again, 25, branch).schedule == branch.schedule
        assert branch.schedule.decay_from == 21 / 30

    def test_decay_follows_the_clock_of_a_timed_run(self) -> None:
        timed = self.config(
            "schedule.decay_from=now", "checkpoint.resume=runs/a", "train.max_wallclock_seconds=15"
        )
        assert self.branch(timed, 21, self.config()).schedule.decay_from == 10.5 / 15

    def test_changes_nothing_else(self) -> None:
        now = self.config("schedule.decay_from=now", "checkpoint.resume=runs/a")
        branch = to_dict(self.branch(now, 21, self.config()))
        expected = to_dict(now)
        assert branch.pop("schedule") != expected.pop("schedule")
        assert branch == expected

    def test_needs_a_checkpoint(self) -> None:
        from jepa_dist.start.resume import _refuse_now

        with pytest.raises(UserError, match="no checkpoint that the decay could begin at"):
            _refuse_now(self.config("schedule.decay_from=now"))
        _refuse_now(self.config())
