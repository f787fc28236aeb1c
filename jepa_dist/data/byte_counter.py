"""Bytes of text per token, for bits per byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ByteCounter:
    """Bytes of text per token, for bits per byte; tables over token ids, each [vocab_size].

    ``base_bytes`` (int16) counts UTF-8 bytes without a leading space, ``has_leading_space``
    (bool) adds one unless the previous token ``is_boundary`` (bool: control tokens, which have
    no text): there SentencePiece has inserted the space itself. Two kinds of models need more:

    * ``has_trailing_space`` (bool; a space ends a word, and SentencePiece adds one at the end of
      a text): that space counts with the token after it, unless that is a boundary.
    * ``spelled_space`` (three ids; a space that has no piece is spelled in the three
      bytes of U+2581): the three count as one byte, or as none if SentencePiece inserted it.
    """

    base_bytes: npt.NDArray[np.int16]
    has_leading_space: npt.NDArray[np.bool_]
    is_boundary: npt.NDArray[np.bool_]
    has_trailing_space: npt.NDArray[np.bool_] | None = None
    spelled_space: tuple[int, int, int] | None = None

    def count(self, prev: npt.NDArray[Any], target: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the bytes of each target given its previous token; ids of one shape, int64 out.

        The last axis is a sequence: ``prev`` is ``target`` one place earlier. Only sums over
        sequences are exact; a single token may count the byte of its neighbor.
        """
        space = self.has_leading_space[target] & ~self.is_boundary[prev]
        counted: npt.NDArray[np.int64] = self.base_bytes[target].astype(np.int64) + space
        if self.has_trailing_space is not None:
            counted += self.has_trailing_space[prev] & ~self.is_boundary[target]
        if self.spelled_space is not None:
            first, second, third = self.spelled_space
            ends_a_space = (prev == second) & (target == third)
            ends_a_space[..., 1:] &= prev[..., :-1] == first
            counted -= 2 * ends_a_space
            counted -= (target == first) & self.is_boundary[prev]
        return counted
