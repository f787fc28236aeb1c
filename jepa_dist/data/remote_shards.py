"""Token shards at a URL: copied once per host into a cache, and read from there.

The cache is ``$XDG_CACHE_HOME/jepa_dist/shards`` (default ``~/.cache``). A shard is copied again if
the service reports another size or version than last time. Steps only read local files.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_dist.data.meta import META_NAME
from jepa_dist.errors import UserError
from jepa_dist.files import MIB, partial_name, read_json, write_atomically
from jepa_dist.remote import Remote, download, open_remote

_INDEX = ".index.json"
_TRIES = 3
# Names of a file's version in different services.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5Hash")


@functools.cache
def fetch_shards(pattern: str, key: str) -> tuple[Path, ...]:
    """Return local copies of the shards that match a URL with wildcards, sorted by name.

    Other processes of the host wait while one copies.

    Args:
        pattern: E.g. ``s3://bucket/fineweb/train_*.bin``.
        key: Configuration key it came from.

    Raises:
        UserError: no match, it cannot be read, or the cache cannot be written.
    """
    remote = open_remote(pattern, key)
    with remote.explaining_errors("cannot be listed"):
        found: Mapping[str, Any] = remote.filesystem.glob(remote.path, detail=True)
    files = {path: about for path, about in found.items() if about.get("type") == "file"}
    if not files:
        raise UserError(f"{remote.label}: no token shard matches there")
    local: list[Path] = []
    for parent in sorted({_parent(path) for path in files}):
        shards = {path: about for path, about in files.items() if _parent(path) == parent}
        folder = cache_folder(pattern.partition("://")[0], parent)
        try:
            with _locked(folder):
                _copy(remote, parent, shards, folder)
        except OSError as error:
            raise UserError(
                f"{remote.label}: its copy {error.filename or folder} cannot be written: "
                f"{error.strerror or error}; free disk space or set XDG_CACHE_HOME"
            ) from None
        local += [folder / _name(path) for path in shards]
    return tuple(sorted(local))


def cache_folder(protocol: str, parent: str) -> Path:
    """Return the folder for the copies of a remote folder's shards."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.blake2b(f"{protocol}://{parent}".encode(), digest_size=8).hexdigest()
    return Path(root).expanduser() / "jepa_dist" / "shards" / digest


def _copy(remote: Remote, parent: str, shards: Mapping[str, Any], folder: Path) -> None:
    """Copy missing or changed shards, and the files that belong to them (meta.json, .idx)."""
    companions = {META_NAME, *(f"{Path(_name(path)).stem}.idx" for path in shards)}
    with suppress(Exception):  # a service without listings only has the shards
        for about in remote.filesystem.ls(parent, detail=True):
            if _name(about["name"]) in companions:
                shards = {**shards, about["name"]: about}
    known = _read_index(folder)
    wanted = {_checked(remote, path): (path, _identity(about)) for path, about in shards.items()}
    missing = {
        name: path
        for name, (path, identity) in wanted.items()
        if known.get(name) != identity or not _is_whole(folder / name, shards[path].get("size"))
    }
    total = sum(shards[path].get("size") or 0 for path in missing.values())
    if missing:
        print(
            f"{remote.label}: copying {len(missing)} files, {total / 2**30:.2f} GiB, to {folder}",
            file=sys.stderr,
        )
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, path in missing.items():
            bar.update(_copy_one(remote, path, folder / name, shards[path].get("size")))
            known[name] = wanted[name][1]
            write_atomically(folder / _INDEX, json.dumps(known) + "\n")


def _copy_one(remote: Remote, path: str, target: Path, size: int | None) -> int:
    for attempt in range(_TRIES):
        partial = partial_name(target)
        try:
            count = download(remote, path, partial, size)
            partial.replace(target)
            return count
        except UserError:
            if attempt + 1 == _TRIES:
                raise
        finally:
            partial.unlink(missing_ok=True)
    raise AssertionError


def _is_whole(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _checked(remote: Remote, path: str) -> str:
    """Return the name of a file; raise if it could be hidden, or outside of the cache's folder."""
    name = _name(path)
    if not name or name.startswith(".") or "\\" in name or "\0" in name or len(name) > 200:
        raise UserError(f"{remote.label}: {name!r:.100} is not a valid shard name; rename it there")
    return name


def _identity(about: Mapping[str, Any]) -> list[str]:
    """Return size and version of a file as the service reports them; they change with it."""
    version = next((about[name] for name in _VERSIONS if about.get(name)), "")
    return [str(about.get("size")), str(version)]


def _read_index(folder: Path) -> dict[str, list[str]]:
    with suppress(OSError, ValueError):
        index = read_json(folder / _INDEX, 64 * MIB)
        if isinstance(index, dict):
            return index
    return {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in folder.glob(".*.partial"):  # of a process that was killed
            left.unlink()
        yield
    finally:
        os.close(descriptor)
