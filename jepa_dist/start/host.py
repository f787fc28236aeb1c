"""Checks that this host can run a rank: temporary folder, shared memory, rendezvous address.

Without them, such a problem shows up as a timeout after minutes, or as an unexplained error.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import check_rendezvous, ranks_on_this_host

# A socket's path has at most 107 characters, and multiprocessing appends
# "/pymp-xxxxxxxx/listener-xxxxxxxx" to TMPDIR.
_LONGEST_TEMPORARY = 107 - 32
_SHARED = Path("/dev/shm")
# For semaphores etc., in addition to the batches.
_SHARED_SLACK = 2**20
_TOKEN_BYTES = 8
# Free space that compilers need for temporary files.
_COMPILER_BYTES = 64 * 2**20


def check_host(config: Config) -> None:
    """Check what training needs on this host, apart from memory.

    Raises:
        UserError: one line for each problem.
    """
    problems: list[str] = []
    for check in (_check_meeting, _check_temporary, _check_shared):
        try:
            check(config)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def check_compiler_space() -> None:
    """Check the free space for compilers' temporary files; their own errors name no folder.

    Raises:
        UserError: too little space.
    """
    folder = os.environ.get("TMPDIR", "")
    if not os.path.isdir(folder):  # Python skips a full one, compilers do not
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
    """Check that the temporary folder is writable and its path is short enough for sockets."""
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
    """Check that shared memory can hold the batches that the loader processes prefetch."""
    data, rows = config.data, min(config.batch.micro, config.batch.sequences)
    if data.workers == 0:
        return
    batch = rows * (config.model.seq_len + 1) * _TOKEN_BYTES
    needed = ranks_on_this_host() * data.workers * data.prefetch * batch + _SHARED_SLACK
    try:
        free = shutil.disk_usage(_SHARED).free
    except OSError:
        return  # this system has shared memory elsewhere
    if free < needed:
        raise UserError(
            f"{_SHARED}: {free / 2**20:.1f} MiB are free, and data.workers={data.workers} with "
            f"data.prefetch={data.prefetch} needs {needed / 2**20:.1f} MiB on this host; free it, "
            "give the container more (docker: --shm-size), or set data.workers=0"
        )
