"""Check that all ranks use the same configuration, data, code and libraries.

Each node reads its own files. A different shard, setting or version on one of them would train a
wrong model without an error (breaking world-size invariance), or hang in a collective.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jepa_dist
from jepa_dist.config import Config, flatten, to_dict
from jepa_dist.errors import SharedError

if TYPE_CHECKING:  # the statement is computed before torch is imported
    from torch._C._distributed_c10d import Store

# Libraries whose version can change results or file formats.
_LIBRARIES = ("torch", "torchdata", "numpy", "safetensors", "pydantic")
_SHOWN_KEYS = 8
_SHOWN_CHARACTERS = 80
_ABSENT = "absent"
_POLL_SECONDS = 0.05
_LEAVE_AFTER_SECONDS = 10.0

Statement = Mapping[str, str]


def statement(config: Config, data: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return everything that must be identical on all ranks, as key -> text.

    Args:
        config: As resolved by this rank.
        data: ``shards.fingerprint`` of each split, read from this rank's own disk.
    """
    settings = {key: json.dumps(value) for key, value in flatten(to_dict(config))}
    files = {
        f"data.{split}: {file['name']}": f"{file['bytes']} bytes with digest {file['digest']}"
        for split, found in data.items()
        for file in found["files"]
    }
    versions = {f"version of {name}": importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        **settings,
        **files,
        **versions,
        "version of python": platform.python_version(),
        "code of jepa_dist": f"{jepa_dist.__version__} with digest {code_digest()}",
    }


def code_digest() -> str:
    """Return a digest of this package's source files and their names."""
    folder = Path(jepa_dist.__file__).parent
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def differences(statements: Sequence[Statement]) -> list[str]:
    """Return one phrase for each key whose value is not the same in all statements.

    Args:
        statements: Of all ranks, in rank order.
    """
    keys = dict.fromkeys(key for each in statements for key in each)
    phrases = []
    for key in keys:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, each in enumerate(statements):
            ranks_by_value.setdefault(each.get(key, _ABSENT), []).append(rank)
        if len(ranks_by_value) > 1:
            found = [f"{_short(v)} on {_ranks(ranks)}" for v, ranks in ranks_by_value.items()]
            phrases.append(f"{key}: {', '.join(found[:4])}{', ...' * (len(found) > 4)}")
    return phrases


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."


def _ranks(ranks: Sequence[int]) -> str:
    """Return e.g. ``rank 3`` or ``ranks 0-1, 4``."""
    groups: list[list[int]] = []
    for rank in ranks:
        if groups and rank == groups[-1][1] + 1:
            groups[-1][1] = rank
        else:
            groups.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in groups)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def check_alike(mine: Statement, store: Store, rank: int, world_size: int) -> None:
    """Compare the statements of all ranks through ``store``. Collective.

    Needs no process group: ranks that differ may be unable to form one. Full statements are
    exchanged only if their digests differ.

    Raises:
        SharedError: on every rank, if they differ; one line names keys, values and ranks.
    """
    digest = hashlib.blake2b(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(_exchange("digest", digest, store, rank, world_size))) == 1:
        return
    statements = _exchange("statement", json.dumps(mine), store, rank, world_size)
    phrases = differences([json.loads(each) for each in statements])
    # Rank 0 hosts the store, so it must exit last.
    store.add("read", 1)
    deadline = time.monotonic() + _LEAVE_AFTER_SECONDS
    while rank == 0 and store.add("read", 0) < world_size and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    more = len(phrases) - _SHOWN_KEYS
    raise SharedError(
        f"the ranks differ in what they were started with: {'; '.join(phrases[:_SHOWN_KEYS])}"
        + (f"; and {more} more" if more > 0 else "")
        + "; start all of them with the same command, on the same data and code"
    )


def _exchange(name: str, value: str, store: Store, rank: int, world_size: int) -> list[str]:
    """Return every rank's ``value``; each distinct one is sent to each rank once."""
    store.set(f"{name}/{rank}", value)
    if rank == 0:
        values = [store.get(f"{name}/{r}").decode() for r in range(world_size)]
        distinct = list(dict.fromkeys(values))
        indices = [distinct.index(each) for each in values]
        store.set(f"{name}/all", json.dumps([distinct, indices]))
    distinct, indices = json.loads(store.get(f"{name}/all").decode())
    return [distinct[index] for index in indices]
