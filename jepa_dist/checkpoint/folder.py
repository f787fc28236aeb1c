"""The folder of checkpoints: staging, atomic publication, setting aside, deletion.

``step_00000100/`` is a complete checkpoint or does not exist. While a checkpoint is written or
deleted, its name starts with a dot, so that a crash never leaves a partial one under its real name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from jepa_dist.errors import UserError
from jepa_dist.files import delete, make_new, write_atomically

LATEST = "latest"

_STAGING = ".staging-"
_DELETING = ".deleting-"
_PUBLISHED = re.compile(r"step_(\d{8,})")
_SET_ASIDE = re.compile(r"aside_(\d+)_step_(\d{8,})")


def name_of(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's folder name; None if it is not the name of one."""
    match = _PUBLISHED.fullmatch(path.name)
    return int(match[1]) if match else None


def published(folder: Path) -> dict[int, Path]:
    """Return all checkpoints by step, oldest first, intact or damaged; empty without a folder."""
    if not folder.is_dir():
        return {}
    steps = [(step_of(path), path) for path in folder.iterdir() if path.is_dir()]
    return dict(sorted((step, path) for step, path in steps if step is not None))


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is kept, but no longer loaded; return its new path."""
    number = 1
    while (aside := path.with_name(f"aside_{number}_{path.name}")).exists():
        number += 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def all_set_aside(folder: Path) -> list[Path]:
    """Return the checkpoints that ``set_aside`` has renamed."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _SET_ASIDE.fullmatch(path.name))


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Set aside every checkpoint of a later step: the run continues from ``step``.

    Without this, a run that crashes after a roll-back would resume from a checkpoint that it had
    rolled back from.

    Returns:
        Their new paths; ``prune`` deletes them.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder):
        return [set_aside(path) for later, path in published(folder).items() if later > step]


def make_folder(folder: Path) -> list[str]:
    """Create the folder of checkpoints and delete what a crash left in it.

    Returns:
        One line for each entry that cannot be deleted; it uses disk space, but is never read.

    Raises:
        UserError: the folder cannot be written.
    """
    messages = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name.startswith((_STAGING, _DELETING)):
                try:
                    delete(path)
                except OSError as error:
                    messages.append(f"{path}: cannot be deleted: {error.strerror or error}")
    return messages


def make_staging(folder: Path, step: int) -> tuple[Path, list[str]]:
    """Create and return a folder to write the checkpoint of ``step`` into.

    Its name is unique: orphan processes of an earlier start of the run cannot write into it.

    Returns:
        The staging folder, and a message if the folder of checkpoints was missing. It is created
        again unless the run directory is missing, too.

    Raises:
        OSError: it cannot be created.
    """
    messages = []
    if not folder.exists():
        folder.mkdir()
        messages.append(f"{folder}: was removed while the run used it; created again")
    staging = folder / f"{_STAGING}{name_of(step)}-{uuid4().hex[:8]}"
    staging.mkdir()
    return staging, messages


def publish(staging: Path, step: int) -> tuple[Path, list[str]]:
    """Rename a complete staging folder to its real name, atomically.

    Returns:
        The checkpoint's path, and a message if a checkpoint of this step existed already.

    Raises:
        OSError: it cannot be renamed.
    """
    sync_folder(staging)
    path = staging.with_name(name_of(step))
    messages = []
    if path.exists():
        messages.append(f"{path}: existed already; kept as {set_aside(path).name}")
    staging.rename(path)
    sync_folder(path.parent)
    return path, messages


def point_latest_to(path: Path) -> None:
    """Write ``latest``, for people and scripts; this package never reads it."""
    write_atomically(path.with_name(LATEST), path.name + "\n", sync=True)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint; a crash meanwhile leaves no partial one under its name.

    Raises:
        OSError: it cannot be deleted.
    """
    hidden = path.with_name(f"{_DELETING}{path.name}-{uuid4().hex[:8]}")
    path.rename(hidden)
    delete(hidden)


def discard(staging: Path) -> None:
    """Delete the staging folder of a failed save, ignoring errors; it may fill the disk."""
    shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a new file and flush it to disk (fsync)."""
    with make_new(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing into an error that says how to fix it.

    Raises:
        UserError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or path
        advice = (
            "it, or a folder above it, was removed or renamed while the run used it"
            if error.errno == errno.ENOENT
            else "free disk space or name another folder (earlier checkpoints are unchanged)"
        )
        raise UserError(
            f"{place}: cannot be written: {error.strerror or error}; {advice}"
        ) from None
