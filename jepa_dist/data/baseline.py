"""N-gram baselines: bits per byte of bigram and trigram models, for comparison in the log.

A model that does not clearly beat these has learned nothing beyond byte statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jepa_dist.data.shards import Shard, check_ids, read_count
from jepa_dist.data.tokenizer import BYTES, ByteCounter, load_tokenizer

MAX_VOCAB = 512  # the trigram table is dense: 4 * vocab_size**3 bytes
MOST_TOKENS = 1 << 25
MOST_TARGETS = 1 << 22

_CHUNK = 1 << 20
_PRIOR = 1.0

Counts = npt.NDArray[np.uint32]
Rates = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NgramBaseline:
    """Bits per byte of n-gram models, and the number of tokens they were counted on."""

    bits_per_byte: dict[str, float]
    """``bigram`` and ``trigram``."""
    counted: int
    """Training tokens that were counted."""
    available: int
    """All training tokens."""


def ngram_baseline(
    train: Sequence[Path],
    windows: Ids,
    vocab_size: int,
    counter: ByteCounter | None = None,
) -> NgramBaseline | None:
    """Return the bits per byte on validation targets of n-gram models counted on shards.

    Counts all tokens of a shard but the first two; of large data a sample of ``MOST_TOKENS``, in
    evenly spaced blocks, since other ranks wait meanwhile.

    Each order is smoothed with the one below it as a Dirichlet prior worth one observation,
    p(z|xy) = (n(xyz) + p(z|y)) / (n(xy) + 1), down to the unigram, whose prior is uniform. All
    targets of the windows are scored, with the context inside their window: the first target has
    one token before it, so the trigram uses the bigram there.

    Args:
        train: Training shards.
        windows: Validation windows, int64 [N, T+1].
        vocab_size: Number of token ids.
        counter: Bytes per token (default: the byte tokenizer's); a target without bytes (BOS)
            still adds its loss.

    Returns:
        The result, or None above 512 ids, where the trigram table is too large.

    Raises:
        UserError: a damaged shard, or a token id outside the vocabulary.
    """
    if vocab_size > MAX_VOCAB:
        return None
    counter = counter or load_tokenizer(BYTES).byte_counter(vocab_size)
    trigrams, bigrams, unigrams = _count(train, vocab_size)
    prev, target = windows[:, :-1], windows[:, 1:]
    unigram = (unigrams[target] + _PRIOR / vocab_size) / (unigrams.sum() + _PRIOR)
    bigram = _smooth(bigrams, prev, target, unigram)
    context = windows[:, :-2] * vocab_size + windows[:, 1:-1]
    trigram = bigram.copy()
    trigram[:, 1:] = _smooth(trigrams, context, target[:, 1:], bigram[:, 1:])
    total_bytes = counter.count(prev, target).sum()
    bits_per_byte = {
        "bigram": float(-np.log2(bigram).sum() / total_bytes),
        "trigram": float(-np.log2(trigram).sum() / total_bytes),
    }
    return NgramBaseline(bits_per_byte, int(unigrams.sum()), sum(map(read_count, train)))


def _smooth(counts: Counts, context: Ids, target: Ids, lower: Rates) -> Rates:
    """Return the probability of each target by ``counts`` [contexts, vocab], prior ``lower``."""
    row_sums = counts.sum(axis=1, dtype=np.int64)
    return (counts[context, target] + _PRIOR * lower) / (row_sums[context] + _PRIOR)


def _count(train: Sequence[Path], vocab_size: int) -> tuple[Counts, Counts, Counts]:
    """Count trigrams [V*V, V], bigrams [V, V] and unigrams [V] in the shards."""
    trigrams = np.zeros(vocab_size**3, dtype=np.uint32)
    bigrams = np.zeros(vocab_size**2, dtype=np.uint32)
    unigrams = np.zeros(vocab_size, dtype=np.uint32)
    for ids in _chunks(train, vocab_size):
        pairs = ids[:-1] * vocab_size + ids[1:]
        np.add.at(unigrams, ids[2:], np.uint32(1))
        np.add.at(bigrams, pairs[1:], np.uint32(1))
        np.add.at(trigrams, pairs[:-1] * vocab_size + ids[2:], np.uint32(1))
    return trigrams.reshape(-1, vocab_size), bigrams.reshape(vocab_size, -1), unigrams


def _chunks(train: Sequence[Path], vocab_size: int) -> Iterator[Ids]:
    """Yield the tokens to count, in pieces that start with their two previous tokens."""
    counts = [read_count(path) for path in train]
    starts = [
        (path, start)
        for path, count in zip(train, counts, strict=True)
        for start in range(2, count, _CHUNK)
    ]
    for path, start in starts[:: -(-sum(counts) // MOST_TOKENS) or 1]:
        shard = Shard(path)
        ids = shard.read(start - 2, min(start + _CHUNK, shard.count)).astype(np.int64)
        check_ids(path, ids, vocab_size)
        yield ids
