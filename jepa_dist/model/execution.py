"""Execution order of blocks: U-Net halves and depth recurrence (golden README section 1).

Phase 0 runs every block once. Later phases repeat the segment ``loop_start..loop_end``: once more
in phase 1, ``num_loops`` more times in phase 2. The first half of the executed list is the
encoder, the rest the decoder; the split may be inside the repeated segment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from jepa_dist.config import ModelConfig

LAST_PHASE = 2


@dataclass(frozen=True)
class Execution:
    """One execution of a block in a pass over the model."""

    block: int
    repeat: int
    """Number of earlier executions of this block in the same pass."""
    is_last: bool
    """Whether this is the block's last execution in the pass, whose output can be tapped."""


@dataclass(frozen=True)
class ExecutionOrder:
    """A pass over the model: encoder executions, then decoder executions."""

    encoder: tuple[Execution, ...]
    decoder: tuple[Execution, ...]

    @property
    def num_skips(self) -> int:
        """Number of skip connections from encoder to decoder executions."""
        return min(len(self.encoder), len(self.decoder))


def execution_order(config: ModelConfig, phase: int) -> ExecutionOrder:
    """Return the executions of one pass in recurrence ``phase`` (0, 1 or 2)."""
    blocks = _block_sequence(config, phase)
    total = Counter(blocks)
    seen: Counter[int] = Counter()
    executions = []
    for block in blocks:
        executions.append(Execution(block, seen[block], seen[block] == total[block] - 1))
        seen[block] += 1
    half = len(executions) // 2
    return ExecutionOrder(tuple(executions[:half]), tuple(executions[half:]))


def _block_sequence(config: ModelConfig, phase: int) -> list[int]:
    repeats = {0: 0, 1: min(config.num_loops, 1), 2: config.num_loops}[phase]
    if repeats == 0:
        return list(range(config.num_layers))
    segment = list(range(config.loop_start, config.loop_end + 1))
    before = list(range(config.loop_start))
    after = list(range(config.loop_end + 1, config.num_layers))
    return before + segment * (1 + repeats) + after


def looped_blocks(config: ModelConfig) -> range:
    """Return the blocks that run more than once per pass in the last phase."""
    if config.num_loops == 0:
        return range(0)
    return range(config.loop_start, config.loop_end + 1)
