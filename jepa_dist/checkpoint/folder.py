"""The folder of checkpoints: staging, the one atomic step, and the way out.

``step_00000100/`` is a whole checkpoint or does not exist. What is being written or deleted is
called something that starts with a dot, so no crash leaves half a checkpoint under a real name.
"""

from __future__ import annotations

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
    """The name of a checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says, or None if it is not the name of one."""
    match = _PUBLISHED.fullmatch(path.name)
    return int(match[1]) if match else None


def published(folder: Path) -> dict[int, Path]:
    """All checkpoints by step, oldest first, whole or damaged; none if there is no folder."""
    if not folder.is_dir():
        return {}
    steps = [(step_of(path), path) for path in folder.iterdir() if path.is_dir()]
    return dict(sorted((step, path) for step, path in steps if step is not None))


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is not loaded any more, and keep it."""
    number = 1
    while (aside := path.with_name(f"aside_{number}_{path.name}")).exists():
        number += 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def all_set_aside(folder: Path) -> list[Path]:
    """What ``set_aside`` has kept."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _SET_ASIDE.fullmatch(path.name))


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Take every checkpoint of a later step out of the run's line: it goes on from ``step``.

    Without this, a run that was rolled back and then crashed would resume from what it fled.

    Returns:
        Where they are now; ``prune`` deletes them.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder):
        return [set_aside(path) for later, path in published(folder).items() if later > step]


def make_folder(folder: Path) -> list[str]:
    """Make the folder of checkpoints and clear what a crash left in it.

    Returns:
        One line for each thing that cannot be deleted; it takes room, and is passed over.

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


def make_staging(folder: Path, step: int) -> Path:
    """A new folder to write the checkpoint of ``step`` into.

    Its name is never used twice: orphans of an earlier start of the run cannot write into it.

    Raises:
        OSError: it cannot be made.
    """
    staging = folder / f"{_STAGING}{name_of(step)}-{uuid4().hex[:8]}"
    staging.mkdir()
    return staging


def publish(staging: Path, step: int) -> tuple[Path, list[str]]:
    """Give a finished staging folder its real name: the one atomic step.

    Returns:
        The checkpoint, and what there is to say: a checkpoint of this step was there already.

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
    """Write ``latest``, for people and scripts; nothing here believes it."""
    write_atomically(path.with_name(LATEST), path.name + "\n", sync=True)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint; a crash in between leaves no half one.

    Raises:
        OSError: it cannot be deleted.
    """
    doomed = path.with_name(f"{_DELETING}{path.name}-{uuid4().hex[:8]}")
    path.rename(doomed)
    delete(doomed)


def discard(staging: Path) -> None:
    """Delete what was staged in vain, as far as possible: it may fill the disk."""
    shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a new file and wait until it is on the disk."""
    with make_new(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that the user can mend.

    Raises:
        UserError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise UserError(
            f"{place}: cannot be written: {error.strerror or error}; free the disk or name another "
            "folder (checkpoints made before are untouched)"
        ) from None
