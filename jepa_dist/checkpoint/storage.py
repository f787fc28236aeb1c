"""Storage backend of torch.distributed.checkpoint for this package's shard files and manifest.

PyTorch plans (which rank writes what, and which rank reads which part of which file at another
world size or mesh) and propagates any rank's failure to all; the format on disk is this package's.
Only tensors are stored, so no file is pickled or unpickled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

import jepa_dist
from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    check_size,
    digest_of,
    fingerprint,
)
from jepa_dist.checkpoint.shard_file import Part, ShardFiles, box_of, torch_dtype, write_shard
from jepa_dist.errors import UserError
from jepa_dist.interop.tensor_file import DTYPES


class SnapshotPlanner(DefaultSavePlanner):
    """A save planner that uses the live tensors' layout and the copies' values."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the copy of a planned tensor."""
        return self._copies[index.fqn]


@dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    path: Path
    bytes: int
    """Total size of all files of all ranks."""
    messages: list[str]


@dataclass(frozen=True)
class _Written:
    """A chunk on disk, as reported to rank 0."""

    chunk: Chunk
    file: FileEntry


class ShardWriter(StorageWriter):
    """Writer of one checkpoint; rank 0 publishes it when every rank has written its shard.

    Args:
        folder: The folder of checkpoints.
        step: Step of this checkpoint.
        state: Its JSON state; rank 0's is stored.
        after: Called on rank 0 with the published checkpoint; returns messages for the user.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        state: Mapping[str, Any],
        after: Callable[[Path], list[str]],
    ) -> None:
        self._folder = folder
        self._step = step
        self._state = state
        self._after = after
        self._world_size = 1
        self._staging: Path | None = None
        self._messages: list[str] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``prepare_global_plan`` creates the staging folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Create the staging folder and assign a file to every rank; called on rank 0."""
        with folders.writing(self._folder):
            self._staging, self._messages = folders.make_staging(self._folder, self._step)
        self._world_size = len(plans)
        return [
            replace(plan, storage_data=str(self._staging / f"shard_{rank:05d}.safetensors"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(Path(plan.storage_data), plan.items, planner))
        return done

    def _write(self, path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        parts = {item.index.fqn: _part(item, planner) for item in items}
        if not parts:
            return []
        with folders.writing(path):
            entry = write_shard(path, parts)
        return [
            WriteResult(
                index=item.index,
                size_in_bytes=parts[item.index.fqn].data.nbytes,
                storage_data=_Written(_chunk(path, parts[item.index.fqn]), entry),
            )
            for item in items
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write state and manifest, publish, and call ``after``; called on rank 0."""
        assert self._staging is not None
        staging = self._staging
        written = [result for of_rank in results for result in of_rank]
        files = {one.storage_data.chunk.file: one.storage_data.file for one in written}
        _check_shared(staging, files)
        with folders.writing(staging):
            files[STATE] = _write_state(staging / STATE, self._state)
            manifest = self._manifest(files, _tensors(metadata, written))
            folders.write_text(staging / MANIFEST, manifest.seal())
            path, messages = folders.publish(staging, self._step)
        self._staging = None
        messages = [*self._messages, *messages, *self._after(path)]
        metadata.storage_data = Published(path, manifest.bytes, messages)

    def discard(self) -> None:
        """Delete the staging folder after a failure, on the rank that created it."""
        if self._staging is not None:
            folders.discard(self._staging)

    def _manifest(self, files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> Manifest:
        return Manifest(
            step=self._step,
            saved_at=time.time(),
            world_size=self._world_size,
            healthy=bool(self._state.get("healthy", True)),
            config_fingerprint=fingerprint(self._state.get("config")),
            data_fingerprint=fingerprint(self._state.get("data_fingerprint")),
            torch=torch.__version__,
            jepa_dist=jepa_dist.__version__,
            files=files,
            tensors=tensors,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False; not used, since the folder is given to the constructor."""
        return False


def _part(item: WriteItem, planner: SavePlanner) -> Part:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    assert item.tensor_data is not None
    return Part(data, tuple(item.tensor_data.chunk.offsets))


def _chunk(path: Path, part: Part) -> Chunk:
    return Chunk(file=path.name, offset=part.offset, shape=tuple(part.data.shape))


def _check_shared(staging: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise if rank 0 does not see the files that other ranks wrote."""
    problems = [check_size(staging / name, entry) for name, entry in files.items()]
    if any(problems):
        raise UserError(
            *(problem for problem in problems if problem),
            f"{staging.parent}: rank 0 does not see what other ranks wrote; the run directory "
            "must be on a file system that all nodes share",
        )


def _write_state(path: Path, state: Mapping[str, Any]) -> FileEntry:
    text = json.dumps(state, indent=1) + "\n"
    folders.write_text(path, text)
    data = text.encode()
    return FileEntry(bytes=len(data), blake2b=digest_of(data).hexdigest())


def _tensors(metadata: Metadata, written: Iterable[WriteResult]) -> dict[str, TensorEntry]:
    chunks: dict[str, list[Chunk]] = {}
    for result in written:
        chunks.setdefault(result.index.fqn, []).append(result.storage_data.chunk)
    entries = {}
    for name, planned in metadata.state_dict_metadata.items():
        assert isinstance(planned, TensorStorageMetadata)
        entries[name] = TensorEntry(
            dtype=DTYPES[planned.properties.dtype],
            shape=tuple(planned.size),
            chunks=tuple(chunks[name]),
        )
    return entries


class ShardReader(StorageReader):
    """Reader of a rank's part of a checkpoint, whose files must have been verified."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._chunk_at = {
            MetadataIndex(name, torch.Size(chunk.offset)): chunk
            for name, entry in manifest.tensors.items()
            for chunk in entry.chunks
            if 0 not in chunk.shape
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the manifest as PyTorch's ``Metadata``."""
        return Metadata({name: _planned(entry) for name, entry in self._manifest.tensors.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plan unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned block into the live tensor it belongs to."""
        with ShardFiles(self._path) as files:
            for item in plan.items:
                name = item.storage_index.fqn
                block = files.read(
                    name,
                    self._manifest.tensors[name].dtype,
                    self._chunk_at[item.storage_index],
                    box_of(item.storage_offsets, item.lengths),
                )
                planner.resolve_tensor(item).copy_(block)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False; not used, since the path is given to the constructor."""
        return False


def _planned(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=torch_dtype(entry.dtype)),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
            for chunk in entry.chunks
            if 0 not in chunk.shape
        ],
    )
