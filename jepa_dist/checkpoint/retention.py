"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """How many checkpoints to keep.

    Raises:
        ValueError: numbers below what is said of them.
    """

    last: int
    """The newest so many; at least 1."""
    every: int = 0
    """Those whose step is a multiple of this, for ever; 0 keeps none of them."""

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise ValueError(f"{self}: expected last >= 1 and every >= 0")


def expendable(healthy: Mapping[int, bool], keep: Keep) -> list[int]:
    """Steps of the checkpoints that the rules do not keep.

    Kept are the last ``keep.last`` (so always the newest), every multiple of ``keep.every``, and
    the newest healthy one: what an unhealthy run goes back to.

    Args:
        healthy: Of every whole checkpoint, by step, whether the losses up to there were finite.
        keep: The rules.
    """
    steps = sorted(healthy)
    kept = set(steps[-keep.last :])
    kept |= {step for step in steps if keep.every and step % keep.every == 0}
    kept |= set([step for step in steps if healthy[step]][-1:])
    return [step for step in steps if step not in kept]
