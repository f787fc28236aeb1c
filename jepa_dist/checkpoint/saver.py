"""Asynchronous saving.

1. ``save`` copies this rank's part into host buffers: only this blocks the training step.
2. A thread with its own process group plans, writes and hashes the shard files (storage.py).
3. Rank 0 publishes with one atomic rename (folder.py) and deletes old checkpoints (retention.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint.agreement import unwrap_checkpoint_exception
from jepa_dist.checkpoint.manifest import Manifest, read_manifest, sizes_match
from jepa_dist.checkpoint.retention import RetentionPolicy, superseded_steps
from jepa_dist.checkpoint.storage import Published, ShardWriter, SnapshotPlanner
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World


@dataclass(frozen=True)
class SaveReport:
    """A completed save."""

    step: int
    path: Path
    stall_seconds: float
    """Time that ``save`` blocked this rank, including the wait for an earlier save."""
    is_first: bool
    """Whether it is the first one of this start, which also allocates the host buffers (page-locked
    for CUDA, which takes several times as long as the copy); later ones reuse them."""
    background_seconds: float
    """From then until the checkpoint was published, on this rank."""
    bytes: int
    """Total size of all files of all ranks."""
    messages: tuple[str, ...]
    """Messages for the user, e.g. that an older checkpoint of this step was renamed."""


class Checkpointer:
    """Writer of a run's checkpoints, one at a time. Construction is collective.

    Args:
        folder: Where they go, on a file system that all ranks share; created if missing, and
            cleared of unfinished checkpoints of an earlier start.
        world: The ranks.
        keep: Which checkpoints to keep.

    Attributes:
        on_published: Called on this rank after each successful save.

    Raises:
        SharedError: on every rank, if the folder cannot be written.
    """

    def __init__(self, folder: Path, world: World, keep: RetentionPolicy) -> None:
        self.folder = folder
        self.on_published: Callable[[SaveReport], None] = lambda report: None
        self._world = world
        self._keep = keep
        # Two threads must not issue collectives on one group: their order differs between ranks.
        self._group = dist.new_group(backend="gloo", timeout=world.timeout)
        self._copies = _HostCopies()
        self._running: _BackgroundSave | None = None
        self._saves = 0
        self._reports: list[SaveReport] = []
        self._manifests: dict[Path, Manifest] = {}
        self._uncleared = world.run_on_main(lambda: folders.make_folder(folder))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> float:
        """Start a save; return as soon as the live tensors may be modified. Call on every rank.

        Waits for an earlier save that is still running.

        Args:
            step: Names the checkpoint. An existing one of this step is renamed and kept.
            tensors: The complete state by name: DTensors of any mesh, or tensors that are identical
                on every rank. The names must be the same on every rank.
            state: JSON data; rank 0's is stored. ``healthy`` (default true), ``config`` and
                ``data_fingerprint`` go into the manifest too.
            wait: Return only when the checkpoint is published.

        Returns:
            Seconds that the caller was blocked.

        Raises:
            SharedError, RuntimeError: this save (with ``wait``) or the one before it failed.
            TypeError: ``state`` is not JSON.
        """
        started = time.perf_counter()
        self.wait()
        state = json.loads(json.dumps(state))
        mine = _owned(tensors, self._world)
        copies = self._copies.take(mine)
        writer = ShardWriter(self.folder, step, state, after=self._after_publish)
        is_first, self._saves = self._saves == 0, self._saves + 1
        self._running = _BackgroundSave(step, is_first, lambda: self._write(writer, mine, copies))
        stall = self._running.stall_seconds = time.perf_counter() - started
        if not wait:
            return stall
        self.wait()
        return time.perf_counter() - started

    @property
    def in_flight(self) -> bool:
        """Whether this rank is still writing a save."""
        return self._running is not None and self._running.running

    @property
    def save_completed(self) -> bool:
        """Whether this rank's save has ended, but ``wait`` has not been called yet."""
        return self._running is not None and not self._running.running

    def poll(self) -> list[SaveReport]:
        """Return the reports of the saves that ``wait`` has finished since the last call.

        A save, or its failure, may end at different steps on different ranks. To handle it at the
        same step, rank 0 puts ``save_completed`` into the plan, and every rank calls ``wait``.
        """
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Wait until the running save, if any, has ended.

        Raises:
            SharedError: it failed for a reason that the user can fix.
            RuntimeError: it failed otherwise, e.g. because a rank has exited.
        """
        flight, self._running = self._running, None
        if flight is not None:
            report = flight.report()
            self._reports.append(report)
            self.on_published(report)

    def close(self) -> None:
        """Wait for the running save; call this before the process group is destroyed.

        Raises:
            SharedError, RuntimeError: the save failed.
        """
        self.wait()

    def _write(
        self, writer: ShardWriter, tensors: dict[str, Tensor], copies: dict[str, Tensor]
    ) -> Published:
        """Write the checkpoint, in the background thread."""
        try:
            metadata = state_dict_saver.save(
                tensors,
                storage_writer=writer,
                planner=SnapshotPlanner(copies),
                process_group=self._group,
            )
        except CheckpointException as error:
            writer.discard()
            raise unwrap_checkpoint_exception(error) from error
        assert isinstance(metadata, Metadata)
        return metadata.storage_data

    def _after_publish(self, path: Path) -> list[str]:
        """Update ``latest`` and delete old checkpoints, on rank 0 after publication.

        Errors become messages: the checkpoint is published, so the save has succeeded.
        """
        messages, self._uncleared = self._uncleared, []
        self._manifests.pop(path, None)
        try:
            folders.point_latest_to(path)
        except OSError as error:
            messages.append(f"{path.with_name(folders.LATEST)}: {error.strerror}; it is outdated")
        for old in self._superseded():
            try:
                folders.remove(old)
            except OSError as error:
                messages.append(f"{old}: cannot be deleted: {error.strerror}")
        return messages

    def _superseded(self) -> list[Path]:
        """Return the checkpoints to delete; those that look damaged are neither counted nor
        deleted."""
        paths = folders.published(self.folder)
        manifests = {step: self._manifest(path) for step, path in paths.items()}
        health = {
            step: manifest.healthy
            for step, manifest in manifests.items()
            if manifest is not None and sizes_match(paths[step], manifest)
        }
        return [paths[step] for step in superseded_steps(health, self._keep)]

    def _manifest(self, path: Path) -> Manifest | None:
        """Return a manifest without its table of tensors; cached, since there may be many."""
        if path not in self._manifests:
            try:
                manifest = read_manifest(path)
            except UserError:
                return None
            self._manifests[path] = manifest.model_copy(update={"tensors": {}})
        return self._manifests[path]


def _owned(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return the tensors that this rank writes; replicas divide them among themselves."""
    return {
        name: tensor.detach()
        for index, (name, tensor) in enumerate(sorted(tensors.items()))
        if _is_owned(index, tensor, world)
    }


def _is_owned(index: int, tensor: Tensor, world: World) -> bool:
    if not isinstance(tensor, DTensor):
        return index % world.world_size == world.rank
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    replica, replicas = 0, 1
    for place, size, placement in zip(
        coordinate, tensor.device_mesh.shape, tensor.placements, strict=True
    ):
        if placement.is_replicate():
            replica, replicas = replica * size + place, replicas * size
    return index % replicas == replica


class _HostCopies:
    """Buffers in host memory (page-locked for CUDA), reused from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies of this rank's parts; the next call overwrites them."""
        parts = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in tensors.items()
        }
        self._buffers = {name: self._buffer(name, part) for name, part in parts.items()}
        for name, part in parts.items():
            self._buffers[name].copy_(part, non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

    def _buffer(self, name: str, part: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == part.shape and buffer.dtype == part.dtype:
            return buffer
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)


class _BackgroundSave:
    """A save in a background thread, started by the constructor."""

    stall_seconds = 0.0

    def __init__(self, step: int, is_first: bool, write: Callable[[], Published]) -> None:
        self._step = step
        self._is_first = is_first
        self._write = write
        self._published: Published | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0
        # A daemon thread, so that a rank that exits after another's failure does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def report(self) -> SaveReport:
        """Wait until it has ended; return its report or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._published is not None
        return SaveReport(
            step=self._step,
            path=self._published.path,
            stall_seconds=self.stall_seconds,
            is_first=self._is_first,
            background_seconds=self._seconds,
            bytes=self._published.bytes,
            messages=tuple(self._published.messages),
        )

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._published = self._write()
        except BaseException as error:
            self._error = error
        self._seconds = time.perf_counter() - started
