"""Windows of an evaluation, and the targets that each of them scores.

The set is the first n * seq_len + 1 tokens of the stream, n as large as possible; its targets are
all of them but the first. Windows begin ``stride`` tokens apart, and each scores only the targets
that no earlier one has scored: every target counts once. With a stride of ``seq_len`` the windows
do not overlap; a smaller one gives every target (but the first few) at least seq_len - stride
tokens of context, at seq_len / stride times the cost (golden README section 6).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jepa_dist.config import Config
from jepa_dist.data.sources import find_sources
from jepa_dist.errors import UserError
from jepa_dist.evaluate.stream import TokenStream


class Rows(NamedTuple):
    """M windows (padding included) of T positions."""

    tokens: npt.NDArray[np.int64]
    """[M, T+1]: inputs and, shifted by one, targets; padding is token 0."""
    scored: npt.NDArray[np.bool_]
    """[M, T]: the targets that are scored."""


class Windows:
    """The windows of an evaluation over ``stream``.

    Args:
        stream: The tokens.
        seq_len: Positions of a window, T.
        stride: Tokens from the start of one window to the next, 1..seq_len.
        sequences: Maximum size of the set in non-overlapping windows; 0: no limit.

    Raises:
        UserError: the stream is shorter than a window, or the stride is out of range.
    """

    def __init__(self, stream: TokenStream, seq_len: int, stride: int, sequences: int = 0) -> None:
        if not 1 <= stride <= seq_len:
            raise UserError(
                f"stride {stride}: must be in 1..{seq_len}, the window's length; otherwise some "
                "targets would never be scored"
            )
        whole = max(0, len(stream) - 1) // seq_len
        if whole == 0:
            raise UserError(
                f"data.val: its {len(stream)} tokens do not fill one window of "
                f"{seq_len} + 1 tokens; use more text or a shorter window"
            )
        self.seq_len = seq_len
        self.stride = stride
        self.num_targets = min(whole, sequences or whole) * seq_len
        self._stream = stream

    def __len__(self) -> int:
        return -(-(self.num_targets - self._context) // self.stride)

    @property
    def overlap(self) -> bool:
        """Whether a window scores only part of its targets."""
        return self.stride < self.seq_len

    def read(self, indices: range, size: int) -> Rows:
        """Return the windows with these indices, padded to ``size`` rows that score nothing.

        Raises:
            UserError: a token id outside the vocabulary.
        """
        tokens = np.zeros((size, self.seq_len + 1), dtype=np.int64)
        scored = np.zeros((size, self.seq_len), dtype=np.bool_)
        for row, index in enumerate(indices):
            start = index * self.stride
            length = min(self.seq_len, self.num_targets - start)
            # The window's end is padded, not cut: its length determines the rotary base.
            tokens[row, : length + 1] = self._stream.read(start, start + length + 1)
            scored[row, self._context if index else 0 : length] = True
        return Rows(tokens, scored)

    @property
    def _context(self) -> int:
        """Number of positions at a window's start that the previous one has scored."""
        return self.seq_len - self.stride


def find_windows(config: Config, stride: int | None) -> dict[str, Windows]:
    """Return the windows to evaluate on, by source; they overlap if there is a ``stride``.

    Raises:
        UserError: no shards, damaged ones, less than one window, or a stride out of range.
    """
    length = config.model.seq_len
    stride = length if stride is None else stride
    return {
        source.name: Windows(
            TokenStream(source.paths, config.model.vocab_size),
            length,
            stride,
            config.eval.sequences,
        )
        for source in find_sources(config, "val")
    }
