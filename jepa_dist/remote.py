"""Files behind URLs (s3://, gs://, https:// and others), through fsspec.

Credentials come from where the service's own tools take them (environment, files in the home
directory), never from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jepa_dist.errors import UserError, one_line
from jepa_dist.files import make_new

# Protocols, and the package that each needs besides fsspec, which torch brings.
_PACKAGES = {
    **{"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"},
    **{"http": "aiohttp", "https": "aiohttp", "file": None, "memory": None},
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SECRET = re.compile(r"(?<=://)[^/@]*@")
_PIECE_BYTES = 8 * 2**20


def is_url(text: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(text) is not None


@dataclass(frozen=True)
class Remote:
    """A location behind a URL."""

    label: str
    """The key and the URL, without a password, for messages."""
    filesystem: Any
    """fsspec's ``AbstractFileSystem``."""
    path: str
    """The location, as the file system names it."""

    def below(self, *names: str) -> str:
        """Return the path of an entry below this location."""
        return "/".join((self.path.rstrip("/"), *names))

    @contextmanager
    def explaining_errors(self, what: str) -> Iterator[None]:
        """Turn any error of a service's library into an error of one line.

        Raises:
            UserError: ``what`` failed.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of botocore, aiohttp, google.auth, ...
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise UserError(one_line(f"{self.label}: {what}: {reason:.300}")) from None

    def upload(self, source: IO[bytes], path: str) -> None:
        """Copy an open file to ``path``. In object stores it appears when complete, with ``file://``
        immediately."""
        with self.filesystem.open(path, "wb") as target:
            while piece := source.read(_PIECE_BYTES):
                target.write(piece)

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield the contents of ``path``."""
        with self.filesystem.open(path, "rb") as source:
            while piece := source.read(_PIECE_BYTES):
                yield piece

    def names(self, path: str) -> list[str]:
        """Return the names of a folder's entries; empty if there is no such folder."""
        try:
            found = self.filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)


def open_remote(url: str, key: str) -> Remote:
    """Return the location behind a URL; nothing is read from it yet.

    Args:
        url: The location.
        key: Configuration key it came from.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    label = f"{key}={_SECRET.sub('...@', url)!r}"
    match = _URL.match(url)
    protocol = match[1].lower() if match else ""
    if protocol not in _PACKAGES or "::" in url:
        raise UserError(f"{label}: expected a path or one of {', '.join(sorted(_PACKAGES))}://")
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except ImportError:
        raise UserError(
            f"{label}: needs the package {_PACKAGES[protocol]}; pip install {_PACKAGES[protocol]} "
            "(jepa_dist[remote] has that of s3://)"
        ) from None
    except Exception as error:
        raise UserError(one_line(f"{label}: {error}")) from None
    return Remote(label, filesystem, str(path))


def download(remote: Remote, path: str, target: Path, size: int | None = None) -> int:
    """Copy a remote file into a new local one; return its size.

    Raises:
        OSError: the local file exists already or cannot be written.
        UserError: it cannot be read whole.
    """
    count = 0
    with make_new(target) as file:
        pieces = remote.pieces(path)
        while True:
            with remote.explaining_errors(f"cannot read {path}"):
                piece = next(pieces, b"")
            if not piece:
                break
            file.write(piece)
            count += len(piece)
    if size is not None and count != size:
        raise UserError(f"{remote.label}: {path}: {count} of {size} bytes arrived")
    return count
