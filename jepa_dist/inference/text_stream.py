"""Decode tokens one by one: a character may be split over several of them."""

from __future__ import annotations

from jepa_dist.data.tokenizer import Tokenizer

# A decoder writes this for bytes that are not a character, possibly because the rest is missing. A
# character has at most four bytes, so at most three of these may still become one.
_BROKEN = "\ufffd"
_MOST_PENDING = 3
# Decoding restarts after this many ids, with the last ones as context.
_WINDOW = 512
_CONTEXT = 32


class TextStream:
    """Stream decoder: the pieces of text add up to ``tokenizer.decode`` of all ids.

    Args:
        tokenizer: Tokenizer of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._written = 0  # number of characters of the decoded ids that were returned

    def add(self, *ids: int) -> str:
        """Append ids; return the characters that are complete and were not returned before."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(_BROKEN)
        end = max(len(whole), len(text) - _MOST_PENDING)
        piece = text[self._written : end]
        self._written = max(self._written, end)
        if len(self._ids) > _WINDOW and self._written == len(text):
            self._ids = self._ids[-_CONTEXT:]
            self._written = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """Return the remaining characters."""
        piece = self._tokenizer.decode(self._ids)[self._written :]
        self._written += len(piece)
        return piece
