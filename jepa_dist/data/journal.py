"""Progress of a preparation on disk, so that a killed one can be resumed.

The journal is in the output folder. It has the number of written tasks, and the sizes of the files
at that time; a resumed preparation truncates files to these sizes. Files are flushed to disk before
the journal is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_dist.data.corpus import Split
from jepa_dist.files import MIB, read_json, write_atomically

JOURNAL = ".journal.json"
# A resumed preparation repeats at most this much, and the tasks in flight.
_SECONDS = 10.0
_PAUSES = 20.0

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Counts = dict[Split, _Count]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShuffleState(_Part):
    """State on disk of documents that are being shuffled (``ShuffledDocuments``)."""

    documents: _Count
    current: Annotated[int, Field(ge=0, lt=2**64)]
    """Key of the latest document, which may continue."""
    bytes: list[tuple[_Count, _Count]]
    """Sizes of each bucket's two files."""


class State(_Part):
    """Contents of the journal."""

    settings: str
    """Digest of everything that the output depends on."""
    tasks: _Count = 0
    bytes_read: _Count = 0
    documents: _Counts = {"train": 0, "val": 0}
    text_bytes: _Counts = {"train": 0, "val": 0}
    counted_bytes: _Counts = {"train": 0, "val": 0}
    shards: dict[Split, list[_Count]] = {"train": [], "val": []}
    """Tokens of each shard; the last one of a split may be unfinished."""
    shuffled: ShuffleState | None = None


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings, which are JSON data."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def read_state(folder: Path, settings: str) -> State:
    """Return the state of the preparation in a folder; an empty one if its settings differ."""
    start = State(settings=settings)
    try:
        state = State.model_validate_json(json.dumps(read_json(folder / JOURNAL, 64 * MIB)))
    except (OSError, ValueError, ValidationError):
        return start
    return state if state.settings == settings else start


class Journal:
    """Periodic writer of a preparation's state.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._next = time.monotonic() + _SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the state again."""
        return time.monotonic() >= self._next

    def write(self, take: Callable[[], State]) -> None:
        """Write the state that ``take`` returns after flushing all its files to disk.

        Called so rarely that flushing takes a small part of the time.
        """
        started = time.monotonic()
        write_atomically(self._path, take().model_dump_json() + "\n", sync=True)
        now = time.monotonic()
        self._next = now + max(_SECONDS, _PAUSES * (now - started))

    def close(self) -> None:
        """Remove the journal: the preparation is done."""
        self._path.unlink(missing_ok=True)


def flush(file: IO[bytes]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def reopen(path: Path, size: int) -> IO[bytes]:
    """Open an existing file for appending, truncated to ``size`` bytes.

    Raises:
        OSError: it is missing, or shorter.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    file = open(descriptor, "r+b")  # noqa: SIM115 - the caller closes it
    if os.fstat(descriptor).st_size < size:
        file.close()
        raise FileNotFoundError(f"{path}: is shorter than it was")
    file.truncate(size)
    file.seek(size)
    return file
