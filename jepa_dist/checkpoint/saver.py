"""Saving while training goes on.

1. ``save`` copies what this rank has to write into host buffers: the only thing the step waits for.
2. A thread with a process group of its own plans, writes and digests the shard files (storage.py).
3. Rank 0 publishes with one atomic rename (folder.py) and lets go what is not kept (retention.py).
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
from jepa_dist.checkpoint.agreement import plainly
from jepa_dist.checkpoint.manifest import Manifest, looks_whole, read_manifest
from jepa_dist.checkpoint.retention import Keep, expendable
from jepa_dist.checkpoint.storage import Published, ShardWriter, SnapshotPlanner
from jepa_dist.errors import UserError
from jepa_dist.parallel.world import World


@dataclass(frozen=True)
class SaveReport:
    """A save that is done."""

    step: int
    path: Path
    stall_seconds: float
    """That ``save`` held the caller on this rank, waiting for an earlier save included."""
    is_first: bool
    """Whether it is the first one of this start, which also allocates the host buffers (page-locked
    for CUDA, which takes several times as long as the copy); later ones reuse them."""
    background_seconds: float
    """From then until the checkpoint was published, on this rank."""
    bytes: int
    """Of all files, all ranks."""
    messages: tuple[str, ...]
    """What people should know, e.g. that a checkpoint of this step was kept under another name."""


class Checkpointer:
    """Writes the checkpoints of a run, one at a time. Construct on every rank alike.

    Args:
        folder: Where they go, on a file system that all ranks share; made if need be, and cleared
            of what an earlier start left unfinished.
        world: The ranks.
        keep: Which checkpoints stay.

    Attributes:
        on_published: Called on this rank after each save that ended well.

    Raises:
        UserError: on every rank, if the folder cannot be written.
    """

    def __init__(self, folder: Path, world: World, keep: Keep) -> None:
        self.folder = folder
        self.on_published: Callable[[], None] = lambda: None
        self._world = world
        self._keep = keep
        # Collectives of two threads on one group get mixed up and hang.
        self._group = dist.new_group(backend="gloo", timeout=world.timeout)
        self._copies = _HostCopies()
        self._flight: _Flight | None = None
        self._saves = 0
        self._reports: list[SaveReport] = []
        self._manifests: dict[Path, Manifest] = {}
        self._uncleared = world.decide(lambda: folders.make_folder(folder))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> float:
        """Start to save; returns when the live tensors may change again. On every rank alike.

        An earlier save that is not done yet is waited for.

        Args:
            step: Names the checkpoint. One that exists already is kept under another name.
            tensors: The whole state by name: DTensors of any mesh, or tensors that are the same
                on every rank. Names and their number must be the same on every rank.
            state: Anything that JSON can hold; rank 0's is kept. ``healthy`` (default true),
                ``config`` and ``data_fingerprint`` go into the manifest too.
            wait: Return only when the checkpoint is published.

        Returns:
            Seconds that the caller was held.

        Raises:
            UserError, RuntimeError: this save (with ``wait``) or the one before it failed.
            TypeError: ``state`` is not JSON.
        """
        started = time.perf_counter()
        self.wait()
        state = json.loads(json.dumps(state))
        mine = _owned(tensors, self._world)
        copies = self._copies.take(mine)
        writer = ShardWriter(self.folder, step, state, after=self._tidy)
        is_first, self._saves = self._saves == 0, self._saves + 1
        self._flight = _Flight(step, is_first, lambda: self._write(writer, mine, copies))
        stall = self._flight.stall_seconds = time.perf_counter() - started
        if not wait:
            return stall
        self.wait()
        return time.perf_counter() - started

    @property
    def in_flight(self) -> bool:
        """Whether a save is still being written by this rank."""
        return self._flight is not None and self._flight.running

    @property
    def has_landed(self) -> bool:
        """Whether a save has ended that nobody has waited for yet."""
        return self._flight is not None and not self._flight.running

    def poll(self) -> list[SaveReport]:
        """Reports of the saves that were waited for since the last call.

        Ranks may see the end of a save, or its failure, at different steps. To see it at the same
        one, let rank 0 ask ``has_landed``, put the answer into the plan, and ``wait`` everywhere.
        """
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Until the save in flight is done.

        Raises:
            UserError: it failed for a reason that the user can mend; the same on every rank.
            RuntimeError: it failed otherwise, e.g. because a rank is gone.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            self._reports.append(flight.report())
            self.on_published()

    def close(self) -> None:
        """Wait for the save in flight; to be called before the process group is torn down.

        Raises:
            UserError, RuntimeError: it failed.
        """
        self.wait()

    def _write(
        self, writer: ShardWriter, tensors: dict[str, Tensor], copies: dict[str, Tensor]
    ) -> Published:
        """In the background."""
        try:
            metadata = state_dict_saver.save(
                tensors,
                storage_writer=writer,
                planner=SnapshotPlanner(copies),
                process_group=self._group,
            )
        except CheckpointException as error:
            writer.discard()
            raise plainly(error) from error
        assert isinstance(metadata, Metadata)
        return metadata.storage_data

    def _tidy(self, path: Path) -> list[str]:
        """On rank 0 with a new checkpoint: ``latest``, and what is not kept any more.

        The checkpoint is published: what fails here is told, but is no failure of the save.
        """
        messages, self._uncleared = self._uncleared, []
        self._manifests.pop(path, None)
        try:
            folders.point_latest_to(path)
        except OSError as error:
            messages.append(f"{path.with_name(folders.LATEST)}: {error.strerror}; it is outdated")
        for doomed in self._expendable():
            try:
                folders.remove(doomed)
            except OSError as error:
                messages.append(f"{doomed}: cannot be deleted: {error.strerror}")
        return messages

    def _expendable(self) -> list[Path]:
        """What may be deleted; what looks damaged neither counts nor goes."""
        paths = folders.published(self.folder)
        manifests = {step: self._manifest(path) for step, path in paths.items()}
        health = {
            step: manifest.healthy
            for step, manifest in manifests.items()
            if manifest is not None and looks_whole(paths[step], manifest)
        }
        return [paths[step] for step in expendable(health, self._keep)]

    def _manifest(self, path: Path) -> Manifest | None:
        """Read once, since many may be kept; without the long table of tensors."""
        if path not in self._manifests:
            try:
                manifest = read_manifest(path)
            except UserError:
                return None
            self._manifests[path] = manifest.model_copy(update={"tensors": {}})
        return self._manifests[path]


def _owned(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this rank writes: its parts, where replicas share the work tensor by tensor."""
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
    """Buffers in host memory (page-locked for CUDA), kept from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's parts, contiguous; they hold until the next call."""
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


class _Flight:
    """A save in the background, started when it is made."""

    stall_seconds = 0.0

    def __init__(self, step: int, is_first: bool, write: Callable[[], Published]) -> None:
        self._step = step
        self._is_first = is_first
        self._write = write
        self._published: Published | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0
        # A daemon: a rank that leaves because another is gone must not wait for a collective.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it is not done yet."""
        return self._thread.is_alive()

    def report(self) -> SaveReport:
        """Wait until it is done and tell; raises what went wrong."""
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
