"""Validation during training: always on the same set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from jepa_dist.data.tokenizer import ByteCounter
from jepa_dist.evaluate.score import Score, add_scores, score
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.windows import Windows
from jepa_dist.parallel.world import World


class Validation:
    """Loss and bits per byte over the first ``sequences`` windows of each source of a data set.

    The windows do not overlap and run through all shards of a source as one stream, as in the
    reference (those of training stay inside their shard).

    Args:
        streams: The tokens of each source, by name; one without a name is not reported
            separately.
        seq_len: Length of a window.
        sequences: Number of windows of each source; 0: all.
        micro: Rows of every forward pass.
        bytes_of: Counts the bytes of target tokens; None if unknown.
        world: Ranks that share the work.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        seq_len: int,
        sequences: int,
        micro: int,
        bytes_of: ByteCounter | None,
        world: World,
    ) -> None:
        self._windows = {
            name: Windows(stream, seq_len, seq_len, sequences) for name, stream in streams.items()
        }
        self._micro = micro
        self._bytes_of = bytes_of
        self._world = world

    @property
    def num_sequences(self) -> int:
        """Number of windows."""
        return sum(map(len, self._windows.values()))

    def windows(self, most: int) -> npt.NDArray[np.int64]:
        """Return the first windows of each source, at most ``most`` in total, int64 [N, T+1]."""
        part = min(most, total := self.num_sequences)
        read = []
        for windows in self._windows.values():
            count = len(windows) * part // total
            read.append(windows.read(range(count), count).tokens)
        return np.concatenate(read)

    def run(
        self, model: nn.Module, phase: int, is_interrupted: Callable[[], bool] | None = None
    ) -> dict[str, float | None]:
        """Evaluate in recurrence ``phase``; the same result on every rank. Collective.

        Returns:
            ``val/loss`` (nats per token) and ``val/bpb`` (bits per byte; None without tokenizer)
            over all sources, and ``val/loss/NAME`` and ``val/bpb/NAME`` of each that has a name.

        Raises:
            InterruptedEvaluationError: see ``score``.
        """
        scores = {
            name: score(
                model,
                windows,
                phase=phase,
                micro=self._micro,
                bytes_of=self._bytes_of,
                world=self._world,
                is_interrupted=is_interrupted,
            )
            for name, windows in self._windows.items()
        }
        metrics = _metrics(add_scores(scores.values()))
        for name, result in scores.items():
            metrics |= _metrics(result, f"/{name}") if name else {}
        return metrics


def _metrics(result: Score, suffix: str = "") -> dict[str, float | None]:
    bits_per_byte = result.bits_per_byte if result.num_bytes else None
    return {f"val/loss{suffix}": result.loss, f"val/bpb{suffix}": bits_per_byte}
