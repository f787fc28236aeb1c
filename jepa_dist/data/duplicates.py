"""Exact duplicates among documents, found by a digest of their text before anything is encoded.

Of equal training documents the first is kept, but none that equals a validation document, wherever
that one is in the input. Validation documents that were named, or chosen by name, are all kept. If
the text of a document determines its split, equal ones are in the same split, and the first is
kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jepa_dist.data.documents import Part, Selected, input_changed, read_texts
from jepa_dist.data.record_files import TextOf

_DIGEST_BYTES = 16
_RECORD = np.dtype([("digest", "<u8", 2), ("is_val", "?"), ("begins", "?")])

Bools = npt.NDArray[np.bool_]


@dataclass
class Digester:
    """Computes digests of a task's texts, in the processes that read the input."""

    text_of: TextOf
    val_fraction: float

    def __call__(self, task: Iterable[Part]) -> bytes:
        """Return a ``_RECORD`` for each text.

        Raises:
            UserError: a bad line of a .jsonl file, by name and number.
        """
        return b"".join(
            _digest(text.data) + bytes([text.split == "val", text.begins])
            for part in task
            for text in read_texts(part, self.text_of, self.val_fraction)
        )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


class Duplicates:
    """The duplicates of an input. Memory: 22 bytes per document, 70 in ``find`` (measured).

    Feed it the results of ``Digester`` in the order of the tasks, then call ``find``.

    Args:
        in_validation: Whether to drop validation documents that equal an earlier one; equal
            documents must be in the same split then.
    """

    def __init__(self, in_validation: bool) -> None:
        self._in_validation = in_validation
        self._digests = bytearray()
        self._is_val = bytearray()
        self._begun: list[int] = []
        self.earlier = 0
        """Number of documents that equal an earlier one."""
        self.validation = 0
        """Number of training documents that equal a validation document."""
        self._keep: Bools = np.zeros(0, dtype=np.bool_)

    def add(self, records: bytes) -> None:
        """Add the records of the next task."""
        found = np.frombuffer(records, dtype=_RECORD)
        continues = np.flatnonzero(~found["begins"])
        done = 0
        for place in continues.tolist():  # texts of long documents
            self._append(found[done:place])
            self._digests[-_DIGEST_BYTES:] = _digest(
                self._digests[-_DIGEST_BYTES:] + found["digest"][place].tobytes()
            )
            done = place + 1
        self._append(found[done:])
        self._begun.append(len(found) - len(continues))

    def _append(self, documents: npt.NDArray[Any]) -> None:
        self._digests += documents["digest"].tobytes()
        self._is_val += documents["is_val"].tobytes()

    def find(self) -> None:
        """Determine which documents to keep."""
        digests = np.frombuffer(self._digests, dtype="<u8").reshape(-1, 2)
        is_val = np.frombuffer(self._is_val, dtype=np.bool_)
        order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: equal ones as in the input
        ordered = digests[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        starts = np.flatnonzero(is_first)
        has_val = np.zeros(0, dtype=np.bool_)
        if len(starts):
            has_val = np.logical_or.reduceat(is_val[order], starts)
        of_val = np.repeat(has_val, np.diff(starts, append=len(order))) & ~is_val[order]
        repeated = ~is_first & ~of_val
        if not self._in_validation:
            repeated &= ~is_val[order]
        self.validation, self.earlier = int(of_val.sum()), int(repeated.sum())
        self._keep = np.empty(len(order), dtype=np.bool_)
        self._keep[order] = ~of_val & ~repeated
        self._digests, self._is_val = bytearray(), bytearray()

    def selected(self, tasks: Iterable[list[Part]]) -> Iterator[Selected]:
        """Yield the tasks with the documents to keep.

        Raises:
            UserError: the tasks differ from those added.
        """
        first = 0
        begun = iter(self._begun)
        for task in tasks:
            if (count := next(begun, None)) is None:
                raise input_changed()
            continued = self._keep[first - 1 : first] if first else np.ones(1, dtype=np.bool_)
            yield Selected(task, np.concatenate([continued, self._keep[first : first + count]]))
            first += count
        if next(begun, None) is not None:
            raise input_changed()

    @property
    def total(self) -> int:
        """Number of dropped documents."""
        return self.earlier + self.validation

    def counts(self) -> dict[str, int]:
        """Return the numbers of dropped documents, by what they equal."""
        return {"earlier": self.earlier, "validation": self.validation}

    def __str__(self) -> str:
        """Return what is dropped, as text."""
        if self._in_validation:
            return f"duplicates dropped: {self.earlier:,} of an earlier document"
        return (
            f"duplicates dropped from training: {self.earlier:,} of an earlier document, "
            f"{self.validation:,} of a validation document"
        )
