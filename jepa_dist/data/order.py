"""The order of samples: a pure function of (seed, epoch) that needs no memory.

Every epoch visits all samples once, in an order given by a keyed bijection of range(n): a
balanced Feistel network on the smallest even number of bits that holds n, applied repeatedly
until the result is inside range(n) (Black and Rogaway, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
# Tiny domains mix badly: below 3 bits per half there are too few round functions.
_MIN_HALF_BITS = 3

Ids = npt.NDArray[np.int64]
Key = npt.NDArray[np.uint64]


def epoch_key(seed: int, epoch: int, source: int = 0) -> Key:
    """Return the round keys of the permutation of a source's epoch, uint64 [rounds]."""
    name = f"order {seed} {epoch}" + (f" {source}" if source else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def permute(positions: Ids, n: int, key: Key) -> Ids:
    """Return the image of each position under the permutation of range(n) given by ``key``.

    Args:
        positions: int64, any shape, values in 0..n-1.
        n: Size of the permuted range, at least 1.
        key: From ``epoch_key``.
    """
    half_bits = max(_MIN_HALF_BITS, -(-(n - 1).bit_length() // 2))
    values = _feistel(positions.astype(np.uint64), half_bits, key)
    outside = values >= n
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= n
    return values.astype(np.int64)


def sample_order(
    first: int, count: int, num_samples: int, seed: int, skip: range = range(0)
) -> Ids:
    """Return the ids of the samples first..first+count-1 of the run, int64 [count].

    The sample at place p of the order is the one at position p % num_samples of epoch
    p // num_samples; a range may span epochs. A sample's place depends only on its number, so a
    changed batch size after a roll-back neither repeats nor drops samples.

    Args:
        first: Samples that the run has consumed before them.
        count: Number of samples.
        num_samples: Samples of an epoch.
        seed: Seed of the order.
        skip: Places in the order that the run skips.
    """
    return visit(places_of(first, count, skip), num_samples, seed)


def places_of(first: int, count: int, skip: range = range(0)) -> Ids:
    """Return the places in the order of samples first..first+count-1 of a run, int64 [count].

    Args:
        first: Samples that the run has consumed before them.
        count: Number of samples.
        skip: Places in the order that the run skips.
    """
    places = np.arange(first, first + count, dtype=np.int64)
    places[places >= skip.start] += len(skip)
    return places


def visit(draws: Ids, num_samples: int, seed: int, source: int = 0) -> Ids:
    """Return the ids of the samples of a source's draws (0, 1, ...), int64 like ``draws``.

    Args:
        draws: Numbers of draws, int64 [N].
        num_samples: Samples of an epoch of the source.
        seed: Seed of the order.
        source: Number of the source; each has its own order.
    """
    epochs, positions = np.divmod(draws, num_samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        ids[inside] = permute(positions[inside], num_samples, epoch_key(seed, epoch, source))
    return ids


def scatter(numbers: npt.NDArray[np.uint64], key: Key) -> npt.NDArray[np.uint64]:
    """Map numbers to pseudo-random 64-bit numbers, distinct ones to distinct ones.

    Args:
        numbers: uint64, any shape.
        key: Round keys, as from ``epoch_key``.
    """
    return _feistel(numbers, 32, key)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, key: Key) -> npt.NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in key:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
