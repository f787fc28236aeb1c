"""Atomic creation of a folder: it appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil

from jepa_dist.errors import UserError


def resolve_target(path: Path) -> Path:
    """Return the folder that ``staged`` replaces for a path, with links resolved.

    Raises:
        UserError: ``staged`` could not replace it: it is a mount point, contains the current
            folder, is not a folder, or is not writable.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_dir():
            raise UserError(f"--out {path}: exists and is not a folder; choose another --out")
    except (OSError, ValueError, RuntimeError) as error:  # too long; a NUL; links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {path}: cannot be a folder: {reason}") from None
    current = Path.cwd()
    if target in (current, *current.parents):
        raise UserError(
            f"--out {path}: is or holds the current folder, which cannot be replaced; name a "
            "folder in it, e.g. --out data/mine"
        )
    if target.is_mount() or str(target) in {m.mountpoint for m in psutil.disk_partitions(all=True)}:
        raise UserError(
            f"--out {path}: is a mount point, which cannot be replaced; name a folder in it, e.g. "
            f"--out {path / 'mine'}"
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {path}: {parent} is not a writable folder")
    return target


@contextlib.contextmanager
def staged(target: Path, is_resumable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``target`` when the block ends normally.

    An existing ``target`` is replaced. After an error the folder is removed. After an interruption
    it is kept if it can be resumed, and a note of the exception says so. The next call yields a
    folder that was kept, or left by a killed process, unchanged.

    Args:
        target: The folder to create.
        is_resumable: Whether the next call can continue what is in the folder.

    Raises:
        UserError: another process is writing the same target, or a link or a file has the name of
            the temporary folder; it is not followed.
    """
    staging = target.with_name(f".{target.name}.partial")
    retired = target.with_name(f".{target.name}.replaced")
    for path in (staging, retired):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: not a folder, but --out {target} needs its name; remove it")
    staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging, target):
        try:
            yield staging
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) or not is_resumable(staging):
                shutil.rmtree(staging)
                raise
            error.add_note(f"{staging} is kept, and the same command resumes")
            raise
        shutil.rmtree(retired, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        staging.rename(target)
        shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may just have published this folder.
        if not folder.exists() or not os.path.samestat(folder.stat(), os.fstat(descriptor)):
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise UserError(
            f"{target}: another process is preparing this folder; wait for it, or choose "
            "another --out"
        ) from None
    finally:
        os.close(descriptor)


def clear(folder: Path, but: Collection[str] = ()) -> None:
    """Remove everything in a folder except entries with one of these names."""
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
