"""One owner per run directory: the lock file ``run.lock``, created atomically, renewed regularly.

Two starts of one command at the same time would write to the same files. The lock names the owner
(host, pid, start time), which updates the file's modification time every few seconds. It is created
by a hard link, which is atomic on shared file systems too (flock is local on some of them). A lock
whose owner is dead is taken over:

* an owner on this machine is dead if its process is gone: detected immediately (torchrun restarts);
* any other owner is dead if the lock has not been renewed for ``STALE_SECONDS`` as observed from
  here, so that clocks need not agree (a job that SLURM requeues on another host).

An owner that lost its lock because it was suspended for that long exits at its next renewal.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

from jepa_dist.errors import UserError
from jepa_dist.process.identity import pid_namespace, start_ticks

LOCK_NAME = "run.lock"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0

# A lock this much older than a file just created next to it is stale without further observation.
_LONG_DEAD_SECONDS = 600.0
_LOOK_SECONDS = 0.5
# If two starts take over a stale lock at the same moment, the later one wins; wait this long before
# reading back which one that is.
_SETTLE_SECONDS = 0.5
_JOIN_SECONDS = 5.0
_MAX_BYTES = 4096
_EXIT_LOST = 1
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Owner:
    """Contents of the lock file."""

    host: str
    machine: str
    """Boot id and pid namespace: pids are comparable only within one."""
    pid: int
    process_started: int
    """Clock ticks since boot; distinguishes the process from a later one with the same pid."""
    started: str
    """When the run was started, readable."""
    token: str


class RunLock:
    """The lock of one run directory; for rank 0. ``acquire`` it before reading the directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / LOCK_NAME
        self._me = _this_process()
        self._made_folder = False
        self._is_held = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def acquire(self) -> tuple[str, ...]:
        """Take the lock, from a dead owner if necessary; may wait up to ``STALE_SECONDS``.

        A read-only directory is not locked.

        Returns:
            Messages for the user.

        Raises:
            UserError: another process of the run is alive.
        """
        try:
            self._made_folder = not self._run_dir.exists()
            self._run_dir.mkdir(parents=True, exist_ok=True)
            messages = self._take()
        except OSError as error:
            if error.errno in _CANNOT_WRITE:
                return ()
            raise UserError(
                f"run.dir={self._run_dir}: cannot be written: {error.strerror}; name another one "
                "(run.dir=...)"
            ) from None
        self._is_held = True
        self._thread.start()
        return messages

    def release(self) -> None:
        """Delete the lock, and the directory if it was created for the lock and is empty."""
        if not self._is_held:
            return
        self._is_held = False
        self._end.set()
        self._thread.join(_JOIN_SECONDS)  # with a time limit: the file system may hang
        with suppress(OSError):
            owner, _ = _look(self._path)
            if owner is not None and owner.token == self._me.token:
                self._path.unlink()
            if self._made_folder:
                self._run_dir.rmdir()

    def _take(self) -> tuple[str, ...]:
        partial = self._path.with_name(f".{LOCK_NAME}.{self._me.token}")
        try:
            partial.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
            while not _create(partial, self._path, self._me.token):
                owner, renewed = _look(self._path)
                if renewed is None:
                    continue  # released in the meantime
                why = self._why_dead(owner, renewed, partial)
                if _look(self._path)[1] != renewed:
                    continue  # another process took it, or the owner is alive
                os.replace(partial, self._path)
                time.sleep(_SETTLE_SECONDS)
                found, _ = _look(self._path)
                if found is not None and found.token == self._me.token:
                    return why
                partial.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
        finally:
            partial.unlink(missing_ok=True)
        return ()

    def _why_dead(self, owner: Owner | None, renewed: int, fresh: Path) -> tuple[str, ...]:
        """Return messages for the user about a dead owner.

        Args:
            owner: None if the lock cannot be read.
            renewed: The lock's modification time, in ns.
            fresh: A file just created on the same file system, to compute the lock's age.

        Raises:
            UserError: the owner is alive.
        """
        if owner is not None and owner.machine == self._me.machine:
            if _is_alive(owner):
                raise self._in_use(owner)
            return ()
        if fresh.stat().st_mtime_ns - renewed < _LONG_DEAD_SECONDS * 1e9:
            deadline = time.monotonic() + STALE_SECONDS
            while time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
                now_owner, now = _look(self._path)
                if now is None:
                    return ()
                if now != renewed:
                    raise self._in_use(now_owner or owner)
        who = "an unknown process" if owner is None else f"process {owner.pid} on {owner.host}"
        return (
            f"{self._run_dir}: was in use by {who}, which has not renewed its lock for "
            f"{STALE_SECONDS:.0f} s or more; taken over",
        )

    def _in_use(self, owner: Owner | None) -> UserError:
        if owner is None:
            who, stop = "another process", "stop it"
        else:
            who = f"process {owner.pid} on {owner.host}, started {owner.started}"
            stop = f"stop it first (kill {owner.pid} there: it saves a checkpoint)"
        return UserError(
            f"run.dir={self._run_dir}: is in use by {who}, which is alive; {stop}, or name another "
            "one (run.dir=...)"
        )

    def _keep(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            # A temporary file system failure must not end the run.
            with suppress(OSError):
                self._renew()

    def _renew(self) -> None:
        owner, renewed = _look(self._path)
        if owner is not None and owner.token != self._me.token:
            self._lost(owner)
        if renewed is None:  # deleted by hand
            self._path.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
        os.utime(self._path)

    def _lost(self, owner: Owner) -> NoReturn:
        with suppress(Exception):
            print(
                f"error: run.dir={self._run_dir}: was taken over by process {owner.pid} on "
                f"{owner.host} because this one did not renew its lock; this one exits",
                file=sys.stderr,
                flush=True,
            )
        os._exit(_EXIT_LOST)


def is_in_use(run_dir: Path) -> bool | None:
    """Return whether the owner of ``run_dir`` is alive; None if there is no lock, or if
    finding out would require waiting."""
    try:
        owner, renewed = _look(run_dir / LOCK_NAME)
    except OSError:
        return None
    if renewed is None:
        return None
    if owner is not None and owner.machine == _machine():
        return _is_alive(owner)
    age = time.time() - renewed / 1e9
    if age < STALE_SECONDS:
        return True
    return False if age > _LONG_DEAD_SECONDS else None


def _create(partial: Path, path: Path, token: str) -> bool:
    """Link ``partial`` to ``path`` unless that exists; atomic, also among hosts."""
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        # Over NFS, a link just created may be reported as existing if the reply was lost.
        owner, _ = _look(path)
        return owner is not None and owner.token == token
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(partial.read_text(encoding="utf-8"))
        return True
    except FileExistsError:
        return False


def _look(path: Path) -> tuple[Owner | None, int | None]:
    """Return the owner (None if unreadable) and the modification time (None if no lock).

    Opening the file, rather than calling stat, makes an NFS client query the server.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():  # a dangling link, which still blocks the name
            return None, path.lstat().st_mtime_ns
        return None, None
    try:
        renewed = os.fstat(descriptor).st_mtime_ns
        text = os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)
    try:
        fields = json.loads(text)
        owner = Owner(**fields)
        is_right = all(isinstance(v, str) for v in (owner.host, owner.machine, owner.token))
        if is_right and isinstance(owner.pid, int) and isinstance(owner.process_started, int):
            return owner, renewed
    except (ValueError, TypeError, RecursionError):
        pass
    return None, renewed


def _this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_started=start_ticks(os.getpid()) or 0,
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=uuid4().hex,
    )


def _machine() -> str:
    """Return an id shared by exactly the processes that see each other's pids (Linux)."""
    try:
        return pid_namespace()
    except OSError:
        return socket.gethostname()


def _is_alive(owner: Owner) -> bool:
    return owner.process_started == start_ticks(owner.pid)
