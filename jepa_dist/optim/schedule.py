"""Schedules as pure functions of the progress of the run (golden README section 5).

``frac`` is the fraction of the run that is over (it may pass 1). Only rank 0 calls these, to fill
the StepPlan (one plan per step).
"""

from __future__ import annotations

import math

from jepa_dist.config.schema import OptimConfig, ScheduleConfig


def rate_multiplier(frac: float, schedule: ScheduleConfig, optim: OptimConfig) -> float:
    """Return the multiplier of all learning rates in the configured schedule, in 0..1.

    ``schedule.decay_from`` must be a number or None (``resume.find_start`` resolves "now").
    """
    if schedule.kind == "cosine":
        shape = cosine(frac, schedule.warmup_frac, optim.min_lr)
    elif schedule.kind == "wsd":
        start = schedule.decay_from
        assert start != "now"
        start = 1 - schedule.decay_frac if start is None else start
        shape = decay(frac, start, optim.min_lr, schedule.decay_shape == "one_minus_sqrt")
    else:
        shape = lr_multiplier(frac, optim.warmdown_frac, optim.min_lr)
    return shape * warmup(frac, schedule.warmup_frac)


def warmup(frac: float, warmup_frac: float) -> float:
    """Return the linear warm-up: from 0 to 1 at ``warmup_frac``, then 1; 0 means always 1."""
    return 1.0 if frac >= warmup_frac else frac / warmup_frac


def cosine(frac: float, start: float, min_lr: float) -> float:
    """Return 1 until ``start``, then half a cosine down to ``min_lr`` at the end of the run."""
    done = min(max(0.0, (frac - start) / (1 - start)), 1.0)
    return min_lr + (1 - min_lr) * (1 + math.cos(math.pi * done)) / 2


def decay(frac: float, start: float, min_lr: float, is_sqrt: bool) -> float:
    """Return 1 until ``start``, then a decay to ``min_lr`` at the end of the run.

    With d the completed fraction of the decay: linear, 1 - d; ``is_sqrt``, 1 - sqrt(d). ``start`` 1
    means always 1.
    """
    if frac < start or start >= 1:
        return 1.0
    done = min((frac - start) / (1 - start), 1.0)
    return min_lr + (1 - min_lr) * (1 - (math.sqrt(done) if is_sqrt else done))


def lr_multiplier(frac: float, warmdown_frac: float, min_lr: float) -> float:
    """Return the multiplier of all rates: 1, then linearly down over the last ``warmdown_frac``.

    ``min_lr`` is the multiplier's floor, not a rate. ``warmdown_frac`` 0 means always 1.
    """
    if warmdown_frac <= 0 or frac < 1 - warmdown_frac:
        return 1.0
    return max((1 - frac) / warmdown_frac, min_lr)


def muon_momentum(step: int, start: float, final: float, warmup_steps: int) -> float:
    """Return Muon's momentum: linear from ``start`` at step 0 to ``final`` at ``warmup_steps``."""
    if step >= warmup_steps:
        return final
    done = step / warmup_steps
    return (1 - done) * start + done * final


def next_phase(
    phase: int, frac: float, num_loops: int, enable_looping_at: float, loop_phase2_at: float
) -> int:
    """Return the recurrence phase of the next step, given that of the last one (0 at first).

    A state machine with at most one transition per call: when both thresholds are passed, phase 1
    still lasts one step. ``loop_phase2_at`` 0 skips phase 1.
    """
    if num_loops == 0:
        return 0
    if phase == 0 and frac >= enable_looping_at:
        return 1 if loop_phase2_at > 0 else 2
    if phase == 1 and frac >= loop_phase2_at:
        return 2
    return phase


def jepa_weight(
    frac: float, lambda_: float, start_frac: float, ramp_frac: float, stop_frac: float = 1.0
) -> float:
    """Return the weight of the JEPA loss: 0 before ``start_frac``, then up to ``lambda_`` over
    ``ramp_frac``, and 0 again from ``stop_frac`` on.

    ``ramp_frac`` 0 gives the full weight at once; ``stop_frac`` 1 never switches it off.
    """
    if frac < start_frac or (stop_frac < 1 and frac >= stop_frac):
        return 0.0
    if ramp_frac <= 0:
        return lambda_
    return lambda_ * min(1.0, (frac - start_frac) / ramp_frac)
