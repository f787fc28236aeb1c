"""Copies of checkpoints behind a URL (``checkpoint.mirror``), for runs whose disk may be lost.

Rank 0 uploads in a thread: no step waits for it, and if uploads take longer than the time between
checkpoints, only the newest waiting one is uploaded. The manifest is uploaded last and deleted
first, so a copy that has one is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from jepa_dist.checkpoint.retention import RetentionPolicy, superseded_steps
from jepa_dist.errors import UserError
from jepa_dist.files import open_regular
from jepa_dist.remote import Remote, download, open_remote

_KEY = "checkpoint.mirror"


class NoMirror:
    """The mirror of a run that copies no checkpoints."""

    def submit(self, path: Path) -> None:
        """Ignore a checkpoint."""

    def take_messages(self) -> list[str]:
        """Return an empty list."""
        return []

    def close(self, seconds: float) -> None:
        """Return immediately."""


class Mirror(NoMirror):
    """Uploader of checkpoints, one at a time.

    Args:
        url: Folder of the copies.
        keep: Which copies to keep.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, keep: RetentionPolicy) -> None:
        self._remote = open_remote(url, _KEY)
        self._keep = keep
        self._healthy: dict[int, bool] = {}  # of copies, by step
        self._waiting: _Open | None = None
        self._messages: list[str] = []
        self._is_closing = False
        self._change = threading.Condition()
        # A daemon thread: a rank that fails does not wait for an upload.
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def submit(self, path: Path) -> None:
        """Queue a checkpoint for upload, replacing one that is still waiting.

        Opens its files, so that they may be deleted meanwhile.
        """
        try:
            opened = _Open(path)
        except OSError as error:
            self._report(f"{self._remote.label}: {path} was not uploaded: {error}")
            return
        with self._change:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = opened
            self._change.notify_all()

    def take_messages(self) -> list[str]:
        """Return the messages since the last call: uploads and failures."""
        with self._change:
            messages, self._messages = self._messages, []
        return messages

    def close(self, seconds: float) -> None:
        """Wait for the uploads, but no longer than ``seconds``."""
        with self._change:
            self._is_closing = True
            self._change.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._report(
                f"{self._remote.label}: an upload has not ended after {seconds:.0f} s and is "
                "abandoned; the next start repeats it"
            )

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._is_closing)
                opened, self._waiting = self._waiting, None
            if opened is None:
                return
            with contextlib.closing(opened):
                try:
                    self._upload(opened)
                except UserError as error:
                    self._report(f"{'; '.join(error.problems)}; the next checkpoint is tried again")

    def _upload(self, opened: _Open) -> None:
        remote, name = self._remote, opened.path.name
        with remote.explaining_errors(f"{name} was not uploaded"):
            text = opened.files[MANIFEST].read()
            contents = json.loads(text)  # of this run's own manifest
            step = contents["step"]
            manifest = remote.below(name, MANIFEST)
            if remote.filesystem.exists(manifest):
                if remote.filesystem.cat_file(manifest) == text:
                    return
                remote.filesystem.rm_file(manifest)
            remote.filesystem.makedirs(remote.below(name), exist_ok=True)
            for file in contents["files"]:
                remote.upload(opened.files[file], remote.below(name, file))
            remote.filesystem.pipe_file(manifest, text)
        self._healthy[step] = contents["healthy"]
        self._report(f"{remote.label}: {name} uploaded")
        with remote.explaining_errors("an old copy was not deleted"):
            steps = _steps(remote)
            later = {other for other in steps if other > step}  # before a roll-back
            health = {each: self._is_healthy(each, steps[each]) for each in steps.keys() - later}
            for old in sorted({*later, *superseded_steps(health, self._keep)}):
                self._delete(steps[old])

    def _is_healthy(self, step: int, name: str) -> bool:
        if step not in self._healthy:
            text = self._remote.filesystem.cat_file(self._remote.below(name, MANIFEST))
            self._healthy[step] = json.loads(text).get("healthy") is True
        return self._healthy[step]

    def _delete(self, name: str) -> None:
        filesystem = self._remote.filesystem
        filesystem.rm_file(self._remote.below(name, MANIFEST))
        filesystem.rm(self._remote.below(name), recursive=True)

    def _report(self, text: str) -> None:
        with self._change:
            self._messages.append(text)


def open_mirror(url: str | None, keep: RetentionPolicy) -> NoMirror:
    """Return the mirror at a URL; a null object without one.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """
    return NoMirror() if url is None else Mirror(url, keep)


class _Open:
    """A checkpoint with open files. Construction reads nothing: the training thread waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.ExitStack() as stack, os.scandir(path) as entries:
            self.files: Mapping[str, IO[bytes]] = {
                entry.name: stack.enter_context(open_regular(path / entry.name))
                for entry in entries
                if entry.is_file(follow_symlinks=False)
            }
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close its files."""
        self._stack.close()


def _steps(remote: Remote) -> dict[int, str]:
    """Return the names of the complete copies, by step."""
    steps = {folders.step_of(Path(name)): name for name in remote.names(remote.path)}
    return {
        step: name
        for step, name in steps.items()
        if step is not None and remote.filesystem.exists(remote.below(name, MANIFEST))
    }


def fetch_newest(url: str, folder: Path) -> list[str]:
    """Copy the newest complete checkpoint of a mirror into ``folder`` and verify it; on rank 0.

    Nothing is copied if ``folder`` has any checkpoint: the mirror may have steps that were rolled
    back.

    Returns:
        Messages for the user.

    Raises:
        UserError: the mirror or the folder cannot be used.
    """
    if folders.published(folder):
        return []
    remote = open_remote(url, _KEY)
    with remote.explaining_errors("cannot be listed"):
        steps = _steps(remote)
    messages: list[str] = [] if steps else [f"{remote.label}: holds no checkpoint"]
    for step in sorted(steps, reverse=True):
        with folders.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            staging, _ = folders.make_staging(folder, step)
        try:
            with folders.writing(staging):
                manifest = _fetch(remote, steps[step], staging)
            problems = verify(staging)
            if not problems and manifest.step == step:
                with folders.writing(folder):
                    folders.publish(staging, step)
                return [*messages, f"{remote.label}: {steps[step]} copied to {folder}"]
            messages.append(f"{remote.label}: {steps[step]} is damaged: {'; '.join(problems[:1])}")
        except UserError as error:
            messages.append(f"{remote.label}: {steps[step]} cannot be used: {error.problems[0]}")
        finally:
            folders.discard(staging)
    return messages


def _fetch(remote: Remote, name: str, staging: Path) -> Manifest:
    """Copy a checkpoint's manifest and the files that it lists, by bare names."""
    download(remote, remote.below(name, MANIFEST), staging / MANIFEST)
    manifest = read_manifest(staging, is_partial=True)
    for file, entry in manifest.files.items():
        download(remote, remote.below(name, file), staging / file, entry.bytes)
    return manifest
