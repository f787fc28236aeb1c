"""Retention policy: which checkpoints to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RetentionPolicy:
    """Number of checkpoints to keep.

    Raises:
        ValueError: a number is out of range.
    """

    last: int
    """Number of newest checkpoints to keep; at least 1."""
    every: int = 0
    """Keep every checkpoint whose step is a multiple of this; 0 disables."""

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise ValueError(f"{self}: expected last >= 1 and every >= 0")


def superseded_steps(healthy: Mapping[int, bool], keep: RetentionPolicy) -> list[int]:
    """Return the steps of the checkpoints to delete.

    Kept are the last ``keep.last`` (so always the newest), every multiple of ``keep.every``, and
    the newest healthy one, to which a run with bad steps rolls back.

    Args:
        healthy: For every intact checkpoint, by step, whether the losses up to it were finite.
        keep: The policy.
    """
    steps = sorted(healthy)
    kept = set(steps[-keep.last :])
    kept |= {step for step in steps if keep.every and step % keep.every == 0}
    kept |= set([step for step in steps if healthy[step]][-1:])
    return [step for step in steps if step not in kept]
