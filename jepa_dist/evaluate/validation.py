"""Validation during training: always on the same set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import nn

from jepa_dist.data.tokenizer import ByteCounter
from jepa_dist.evaluate.score import score
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.windows import Windows
from jepa_dist.parallel.world import World


class Validation:
    """Loss and bits per byte over the first ``sequences`` windows of a data set.

    The windows do not overlap and run through all shards as one stream, as in the reference
    (those of training stay inside their shard).

    Args:
        stream: The tokens.
        seq_len: Length of a window.
        sequences: How many windows; 0 takes all.
        micro: Rows of every forward pass.
        bytes_of: Counts the bytes that target tokens stand for; None if nobody knows.
        world: Ranks that share the work.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        sequences: int,
        micro: int,
        bytes_of: ByteCounter | None,
        world: World,
    ) -> None:
        self._windows = Windows(stream, seq_len, seq_len, sequences)
        self._micro = micro
        self._bytes_of = bytes_of
        self._world = world

    @property
    def num_sequences(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def windows(self, most: int) -> npt.NDArray[np.int64]:
        """The first windows of the validation set, at most ``most``, int64 [N, T+1]."""
        count = min(most, self.num_sequences)
        return self._windows.read(range(count), count).tokens

    def run(
        self, model: nn.Module, phase: int, is_interrupted: Callable[[], bool] | None = None
    ) -> dict[str, float | None]:
        """Evaluate in recurrence ``phase``; the same result on every rank. Collective.

        Returns:
            ``val/loss`` (nats per token) and ``val/bpb`` (bits per byte; None without tokenizer).

        Raises:
            InterruptedEvaluationError: see ``score``.
        """
        result = score(
            model,
            self._windows,
            phase=phase,
            micro=self._micro,
            bytes_of=self._bytes_of,
            world=self._world,
            is_interrupted=is_interrupted,
        )
        bits_per_byte = result.bits_per_byte if result.num_bytes else None
        return {"val/loss": result.loss, "val/bpb": bits_per_byte}
