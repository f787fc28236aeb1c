"""The n-gram baselines of a run, and the text that its tokenizer loses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from jepa_dist.config import Config
from jepa_dist.data.baseline import MAX_VOCAB, MOST_TARGETS, MOST_TOKENS, ngram_baseline
from jepa_dist.data.sources import find_split
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.evaluate.validation import Validation

# Longest wait at the end: the run may be shorter than the count, or its file system hang.
_MOST_SECONDS = 60.0


class Baselines:
    """Baselines and loss of the tokenizer: printed, and kept for the closing record.

    On rank 0 only. A thread computes the baselines while training begins: in the main thread, the
    other ranks would wait for rank 0 in a collective.

    Args:
        config: The run.
        validation: The windows that the baselines are scored on.
        tokenizer: Counts bytes; None: nothing is computed, since bits per byte are unknown.
        say: Prints a line; called from the thread, too.
    """

    def __init__(
        self,
        config: Config,
        validation: Validation,
        tokenizer: Tokenizer | None,
        say: Callable[[str], None],
    ) -> None:
        self._values: dict[str, Any] = {}
        self._thread = threading.Thread(
            target=self._compute,
            args=(config, validation, tokenizer, say),
            name="baselines",
            daemon=True,
        )
        if tokenizer is not None:
            self._values = _note(tokenizer, say)
            self._thread.start()

    def values(self) -> dict[str, Any]:
        """Return the fields of the closing record; waits up to 60 s for the thread.

        Baselines that are not complete by then are missing.
        """
        if self._thread.is_alive():
            self._thread.join(_MOST_SECONDS)
        return dict(self._values)

    def _compute(
        self,
        config: Config,
        validation: Validation,
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ) -> None:
        try:
            self._values |= compute_baselines(config, validation, tokenizer, say)
        except Exception as error:  # training does not depend on them
            say(f"warning: no n-gram baselines: {type(error).__name__}: {error}")


def compute_baselines(
    config: Config, validation: Validation, tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compute and print the n-gram baselines, on samples of large data."""
    vocab_size, seq_len = config.model.vocab_size, config.model.seq_len
    if vocab_size > MAX_VOCAB:
        return {}
    train = find_split(config, "train")
    windows = validation.windows(max(1, MOST_TARGETS // seq_len))
    baseline = ngram_baseline(train, windows, vocab_size, tokenizer.byte_counter())
    assert baseline is not None
    bits, of = baseline.bits_per_byte, validation.num_sequences
    samples = ""
    if baseline.available > MOST_TOKENS or len(windows) < of:
        samples = (
            f" (counted on {baseline.counted:,} of {baseline.available:,} training tokens, "
            f"scored on {len(windows):,} of {of:,} validation sequences)"
        )
    say(
        f"n-gram baselines: bigram {bits['bigram']:.4f}, trigram {bits['trigram']:.4f} bits "
        f"per byte{samples}"
    )
    return {f"baseline/{name}_bpb": value for name, value in bits.items()}


def _note(tokenizer: Tokenizer, say: Callable[[str], None]) -> dict[str, str]:
    """Print and return which part of a text the tokenizer loses."""
    if tokenizer.note is None:
        return {}
    say(tokenizer.note)
    return {"tokenizer_note": tokenizer.note}
