"""Find the checkpoint to resume from, and load it into the live tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException

from jepa_dist.checkpoint.agreement import on_every_rank, unwrap_checkpoint_exception
from jepa_dist.checkpoint.folder import published
from jepa_dist.checkpoint.manifest import Manifest, check_files, read_manifest, read_state
from jepa_dist.checkpoint.storage import ShardReader
from jepa_dist.errors import UserError
from jepa_dist.interop.tensor_file import DTYPES
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.parallel.world import World


@dataclass(frozen=True)
class Found:
    """The result of ``find_resumable``."""

    path: Path | None
    """The newest intact checkpoint, or None. None with messages: all are damaged, so the caller
    must not silently start at step 0."""
    messages: tuple[str, ...]
    """One line for each newer, damaged checkpoint: its path and the damage."""


def find_resumable(folder: Path, world: World, *, only_healthy: bool = False) -> Found:
    """Return the newest checkpoint whose files match their digests. Collective; the same on every
    rank.

    Every rank reads its share of the files.

    Args:
        folder: The folder of the run's checkpoints.
        world: The ranks.
        only_healthy: Skip checkpoints that were saved when the loss was not finite.
    """
    messages = []
    names = world.run_on_main(lambda: [path.name for path in published(folder).values()])
    for path in (folder / name for name in reversed(names)):
        try:
            verify_together(path, world)
        except UserError as error:
            messages.append(f"{path}: skipped, damaged or incomplete: {_brief(error)}")
            continue
        if not only_healthy or world.run_on_main(partial(_is_healthy, path)):
            return Found(path, tuple(messages))
    return Found(None, tuple(messages))


def _is_healthy(path: Path) -> bool:
    return read_manifest(path).healthy


def _brief(error: UserError) -> str:
    first, *others = error.problems
    return f"{first} (and {len(others)} more)" if others else first


def verify_together(path: Path, world: World) -> None:
    """Verify a checkpoint; every rank reads its share of the files. Collective.

    Raises:
        SharedError: on every rank, with the problems that all ranks found.
    """
    on_every_rank(lambda: _verify_share(path, world), world)


def _verify_share(path: Path, world: World) -> None:
    manifest = read_manifest(path)
    share = sorted(manifest.files)[world.rank :: world.world_size]
    problems = check_files(path, manifest, share)
    if problems:
        raise UserError(*problems)


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    world: World,
    *,
    verified: bool = False,
    is_optional: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Fill ``tensors`` in place, at any world size and mesh. Collective.

    Args:
        path: The checkpoint.
        tensors: The tensors that ``save`` was given, in their current layout.
        world: The ranks.
        verified: Skip verification, because ``find_resumable`` has just done it.
        is_optional: Returns, by name, whether a tensor may be in only one of checkpoint and
            ``tensors``; tensors that the checkpoint does not have are unchanged.

    Returns:
        The ``state`` that ``save`` was given.

    Raises:
        SharedError: on every rank, with all problems: damaged files, or tensors that are missing,
            unknown, or of another shape or dtype; ``tensors`` are unchanged.
    """
    if not verified:
        verify_together(path, world)
    manifest, state = on_every_rank(lambda: _fitting(path, tensors, is_optional), world)
    try:
        state_dict_loader.load(
            {n: tensor.detach() for n, tensor in tensors.items() if n in manifest.tensors},
            storage_reader=ShardReader(path, manifest),
            process_group=world.control,
        )
    except CheckpointException as error:
        raise unwrap_checkpoint_exception(error) from error
    return state


def _fitting(
    path: Path, tensors: Mapping[str, Tensor], is_optional: Callable[[str], bool]
) -> tuple[Manifest, dict[str, Any]]:
    """Return manifest and state of a checkpoint; raise if it does not match ``tensors``."""
    manifest, state = read_manifest(path), read_state(path)
    expected = {
        name: Signature(tuple(tensor.shape), DTYPES[tensor.dtype])
        for name, tensor in tensors.items()
    }
    found = {name: Signature(entry.shape, entry.dtype) for name, entry in manifest.tensors.items()}
    only_one = expected.keys() ^ found.keys()
    for name in filter(is_optional, only_one):
        expected.pop(name, None)
        found.pop(name, None)
    problems = mismatches(str(path), expected, found)
    if problems:
        raise UserError(*problems)
    return manifest, state
