"""The weights of a run: its newest checkpoint, a given one, or its exported model."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint.extract import read_model
from jepa_dist.checkpoint.manifest import verify
from jepa_dist.config import check
from jepa_dist.errors import UserError
from jepa_dist.interop.hf.export_folder import is_hf_folder, read_folder
from jepa_dist.interop.safetensors_io import (
    Description,
    Weights,
    find_export,
    read_description,
)
from jepa_dist.interop.tensor_file import lazy_tensors
from jepa_dist.quantize.artifact import find_artifact, read_artifact

_CHECKPOINTS = "checkpoints"
_MOST_STEPS_LISTED = 10


@dataclass(frozen=True)
class Stored:
    """Weights found on disk."""

    path: Path
    """The checkpoint or tensor file."""
    description: Description
    tensors: Mapping[str, Tensor]
    """Tensors by parameter name, on the CPU."""
    notes: tuple[str, ...] = ()
    """One line for each newer checkpoint that is damaged and was skipped."""


def read_stored(run: Path, step: int | None, weights: Weights) -> Stored:
    """Read the weights of a run; see ``find_stored``."""
    stored = find_stored(run, step, weights)
    return replace(stored, tensors=dict(stored.tensors))


def find_stored(run: Path, step: int | None, weights: Weights) -> Stored:
    """Find the weights of a run, in formats that contain only data, and verify every digest.

    Each tensor is read when it is looked up.

    Args:
        run: A run directory, a folder with an exported model, its .safetensors file, one
            checkpoint, a quantized artifact, or a folder written for transformers.
        step: Optimizer step of the weights; None takes the newest intact ones.
        weights: The parameters themselves or their moving average.

    Raises:
        UserError: no weights, none of this step or kind, or damaged ones.
    """
    if not run.exists():
        raise UserError(f"{run}: no such file or folder; expected a run directory")
    artifact = find_artifact(run, weights)
    if artifact is not None:
        return _read_quantized(artifact, step)
    if is_hf_folder(run):
        return _read_hf(run, step, weights)
    if run.is_file():
        return _read_export(run, step, weights)
    if folders.step_of(run) is not None:
        return _read_checkpoint(run, weights)
    checkpoints = folders.published(run / _CHECKPOINTS) or folders.published(run)
    notes: list[str] = []
    exported, exported_step = _find_export(run, weights, notes)
    if step is not None:
        if exported is not None and exported_step == step:
            return _read_export(exported, step, weights)
        if step in checkpoints:
            return _read_checkpoint(checkpoints[step], weights)
        raise _no_such_step(run, step, {*checkpoints, exported_step} - {None})
    for newest in sorted(checkpoints, reverse=True):
        if exported is not None and (exported_step is None or exported_step >= newest):
            break
        problems = verify(checkpoints[newest])
        if not problems:
            return _read_checkpoint(checkpoints[newest], weights, tuple(notes), verified=True)
        notes.append(f"{checkpoints[newest]}: skipped, it is damaged: {problems[0]}")
    if exported is not None:
        return _read_export(exported, None, weights, tuple(notes))
    if checkpoints:
        raise UserError(
            f"{run}: none of its {len(checkpoints)} checkpoints is intact; "
            f"jepa_dist checkpoint verify {run} says why"
        )
    raise UserError(
        f"{run}: holds no checkpoint and no exported model; expected a run directory in which "
        "training has saved (checkpoint.every), or the result of jepa_dist checkpoint export"
    )


def _find_export(run: Path, weights: Weights, notes: list[str]) -> tuple[Path | None, int | None]:
    """Return a folder's exported model and its step; skip an incomplete one with a note."""
    try:
        file = find_export(run, weights)
    except UserError:
        return None, None
    try:
        return file, read_description(file).step
    except UserError as error:
        notes.append(f"{file}: skipped: {error.problems[0]}")
        return None, None


def _no_such_step(run: Path, step: int, steps: Set[int | None]) -> UserError:
    known = sorted(each for each in steps if each is not None)
    listed = ", ".join(map(str, known[-_MOST_STEPS_LISTED:]))
    if len(known) > _MOST_STEPS_LISTED:
        listed = f"..., {listed}"
    return UserError(f"{run}: has no weights of step {step}; it has {listed or 'none at all'}")


def _read_export(
    file: Path, step: int | None, weights: Weights, notes: tuple[str, ...] = ()
) -> Stored:
    file = find_export(file, weights)
    description = read_description(file)
    _check_description(file, description, step, weights)
    return Stored(file, description, lazy_tensors(file), notes)


def _read_hf(folder: Path, step: int | None, weights: Weights) -> Stored:
    description, tensors = read_folder(folder)
    _check_description(folder, description, step, weights)
    return Stored(folder, description, tensors)


def _check_description(
    path: Path, description: Description, step: int | None, weights: Weights
) -> None:
    if description.weights != weights:
        raise UserError(
            f"{path}: holds {description.weights} weights, but {weights} weights were asked for"
        )
    if step is not None and description.step != step:
        raise _no_such_step(path, step, {description.step})


def _read_quantized(file: Path, step: int | None) -> Stored:
    """Return the weights of an artifact, which was made from live or averaged ones."""
    artifact = read_artifact(file)
    if step is not None and artifact.description.step != step:
        raise _no_such_step(file, step, {artifact.description.step})
    return Stored(file, artifact.description, artifact.tensors())


def _read_checkpoint(
    path: Path, weights: Weights, notes: tuple[str, ...] = (), *, verified: bool = False
) -> Stored:
    problems = [] if verified else verify(path)
    if problems:
        raise UserError(*problems)
    description, tensors = read_model(path, weights)
    problems = check(description.config)
    if problems:
        raise UserError(*(f"{path}: config: {problem}" for problem in problems))
    return Stored(path, description, tensors, notes)
