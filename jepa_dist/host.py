"""Whether this host can run a rank: temporary folder, shared memory, the address to meet at.

What is checked here would otherwise end in a wait of minutes, or in an error without a cause.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.launched import check_rendezvous, ranks_on_this_host

# A socket's path has at most 107 characters; to TMPDIR multiprocessing adds
# "/pymp-xxxxxxxx/listener-xxxxxxxx".
_LONGEST_TEMPORARY = 107 - 32
_SHARED = Path("/dev/shm")
# Semaphores and the like, besides the batches.
_SHARED_SLACK = 2**20
_TOKEN_BYTES = 8
# Room that compilers need for temporary files.
_COMPILER_BYTES = 64 * 2**20


def check_host(config: Config) -> None:
    """Check what training needs of this host besides memory.

    Raises:
        UserError: everything that is missing, one line each.
    """
    problems: list[str] = []
    for check in (_check_meeting, _check_temporary, _check_shared):
        try:
            check(config)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def check_room_to_compile() -> None:
    """See that compilers have room for their temporary files, whose errors name no folder.

    Raises:
        UserError: they have not.
    """
    folder = os.environ.get("TMPDIR", "")
    if not os.path.isdir(folder):  # Python passes over a full one, compilers do not
        folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < _COMPILER_BYTES:
        raise UserError(
            f"TMPDIR={folder}: has {free >> 20} MiB free, but compiling needs "
            f"{_COMPILER_BYTES >> 20}; free it, name another folder (export TMPDIR=...), or set "
            "parallel.compile=false"
        )


def _check_meeting(_: Config) -> None:
    check_rendezvous(os.environ)


def _check_temporary(config: Config) -> None:
    """The folder for temporary files can be written, and sockets fit into it."""
    folder = os.environ.get("TMPDIR", "/tmp")
    try:
        folder = tempfile.gettempdir()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise UserError(
            f"TMPDIR: temporary files cannot be written to {folder}: {error.strerror}; free it, or "
            "set TMPDIR to another folder"
        ) from None
    length = len(os.fsencode(folder))
    if config.data.workers > 0 and length > _LONGEST_TEMPORARY:
        raise UserError(
            f"TMPDIR={folder}: {length} characters are too long for the sockets of the loader "
            f"processes, at most {_LONGEST_TEMPORARY}; set TMPDIR to a shorter path, or "
            "data.workers=0"
        )


def _check_shared(config: Config) -> None:
    """Shared memory holds the batches that the loader processes keep ready."""
    data, rows = config.data, min(config.batch.micro, config.batch.sequences)
    if data.workers == 0:
        return
    batch = rows * (config.model.seq_len + 1) * _TOKEN_BYTES
    needed = ranks_on_this_host() * data.workers * data.prefetch * batch + _SHARED_SLACK
    try:
        free = shutil.disk_usage(_SHARED).free
    except OSError:
        return  # this system keeps shared memory elsewhere
    if free < needed:
        raise UserError(
            f"{_SHARED}: {free / 2**20:.1f} MiB are free, and data.workers={data.workers} with "
            f"data.prefetch={data.prefetch} needs {needed / 2**20:.1f} MiB on this host; free it, "
            "give the container more (docker: --shm-size), or set data.workers=0"
        )
