"""Text of tokens as they come: characters may be spread over several of them."""

from __future__ import annotations

from jepa_dist.data.tokenizer import Tokenizer

# What a decoder writes for bytes that are no character, maybe because the rest is to come. A
# character has at most four bytes, so at most three of these may still become one.
_BROKEN = "\ufffd"
_MOST_PENDING = 3
# Decoding starts anew after so many ids, with the last ones as context.
_WINDOW = 512
_CONTEXT = 32


class TextStream:
    """Turns ids into pieces of text, whose sum is ``tokenizer.decode`` of all ids.

    Args:
        tokenizer: Decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._written = 0  # characters of the decoded ids that were handed out

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
        """Return the characters that are left."""
        piece = self._tokenizer.decode(self._ids)[self._written :]
        self._written += len(piece)
        return piece
