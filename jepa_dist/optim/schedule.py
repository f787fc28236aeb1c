"""Schedules as pure functions of the progress of the run (golden README section 5).

``frac`` is the fraction of the run that is over (it may pass 1). Only rank 0 calls these, to fill
the StepPlan (contract C2).
"""

from __future__ import annotations


def lr_multiplier(frac: float, warmdown_frac: float, min_lr: float) -> float:
    """Multiplier of all learning rates: 1, then linearly down over the last ``warmdown_frac``.

    ``min_lr`` is the multiplier's floor, not a rate. ``warmdown_frac`` 0 means always 1.
    """
    if warmdown_frac <= 0 or frac < 1 - warmdown_frac:
        return 1.0
    return max((1 - frac) / warmdown_frac, min_lr)


def muon_momentum(step: int, start: float, final: float, warmup_steps: int) -> float:
    """Muon's momentum: linear from ``start`` at step 0 to ``final`` at step ``warmup_steps``."""
    if step >= warmup_steps:
        return final
    done = step / warmup_steps
    return (1 - done) * start + done * final


def next_phase(
    phase: int, frac: float, num_loops: int, enable_looping_at: float, loop_phase2_at: float
) -> int:
    """Recurrence phase of the coming step, given that of the step before (0 before the first).

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
    """Weight of the JEPA loss: 0 before ``start_frac``, then up to ``lambda_`` over ``ramp_frac``,
    and 0 again from ``stop_frac`` on.

    ``ramp_frac`` 0 gives the whole weight at once; ``stop_frac`` 1 never switches it off.
    """
    if frac < start_frac or (stop_frac < 1 and frac >= stop_frac):
        return 0.0
    if ramp_frac <= 0:
        return lambda_
    return lambda_ * min(1.0, (frac - start_frac) / ramp_frac)
