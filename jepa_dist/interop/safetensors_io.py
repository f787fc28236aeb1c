"""An unsharded model as ``model.safetensors``, with a ``model.json`` that describes it.

The averaged weights of a run (EMA) are ``ema.safetensors`` and ``ema.json``. The JSON is written
last: a tensor file without one is not a finished export. Files do not depend on how the model was
sharded; writing gathers one parameter at a time, reading only reads a rank's shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import jepa_dist
from jepa_dist.config import Config, check
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.files import MIB, partial_name, read_bytes, write_atomically
from jepa_dist.interop.tensor_file import DTYPES, TensorFile, lazy_tensors
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.parallel.shard import fsdp_modules, local_slices
from jepa_dist.parallel.world import World

Weights = Literal["live", "ema"]

_STEMS: dict[Weights, str] = {"live": "model", "ema": "ema"}


class Description(BaseModel):
    """Contents of the JSON file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1] = 1
    """Version of this layout."""
    step: int | None
    """Optimizer step of the weights; None if unknown."""
    phase: int = Field(ge=0, le=LAST_PHASE)
    """Recurrence phase that the weights were last trained in, and must be run in."""
    weights: Weights
    """The parameters themselves, or their moving average."""
    config: Config
    """Resolved configuration of the run that trained the weights."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """For people: versions, number of parameters, origin."""


# ---------------------------------------------------------------------------- writing


def export_model(
    folder: Path,
    model: nn.Module,
    config: Config,
    step: int,
    world: World,
    *,
    phase: int,
    weights: Weights = "live",
) -> Path:
    """Write a (sharded) model; only rank 0 writes. Collective.

    Parameters are gathered one at a time; rank 0 keeps them in CPU memory until they are written.
    For the average, call it inside ``EMA.swap``, with ``weights="ema"``.

    Args:
        folder: Folder of the two files; created if missing, an earlier export is replaced.
        model: The model; FSDP units that are still gathered are freed first.
        config: Configuration of the run.
        step: Optimizer steps taken.
        world: The ranks.
        phase: Recurrence phase to run the weights in.
        weights: Which weights the model holds now.

    Returns:
        Path of the tensor file.

    Raises:
        SharedError: on every rank, if the files cannot be written.
    """
    state = gather(model, keep=world.is_main)
    description = Description(step=step, phase=phase, weights=weights, config=config)
    return Path(world.run_on_main(lambda: str(write_export(folder, state, description))))


@torch.no_grad()
def gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return full parameters by name, on the CPU, in their dtype. Collective if sharded.

    Args:
        model: The model; FSDP units that are still gathered are freed first.
        keep: Whether this rank keeps them; otherwise it only participates, and gets none.
    """
    for unit in fsdp_modules(model):
        unit.reshard()
    state = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            state[name] = full.detach().cpu().contiguous()
    return state


def write_export(
    folder: Path,
    state: Mapping[str, Tensor],
    description: Description,
    *,
    allow_not_finite: bool = False,
) -> Path:
    """Write full tensors and their description; each file atomically, the JSON last.

    Returns:
        Path of the tensor file.

    Raises:
        UserError: the files cannot be written, or a tensor is not finite and this is not allowed.
    """
    path = folder / f"{_STEMS[description.weights]}.safetensors"
    refuse_not_finite(path, state, allow_not_finite)
    described = description.model_copy(
        update={"metadata": {**_versions(state), **description.metadata}}
    )
    text = described.model_dump_json(by_alias=True, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        publish(path, lambda partial: save_file(dict(state), partial))
        write_atomically(path.with_suffix(".json"), text, sync=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written: {error}; free the disk or name another folder"
        ) from None
    return path


def refuse_not_finite(path: Path, state: Mapping[str, Tensor], allow: bool) -> None:
    """Raise for weights that are not finite, unless the user allows them.

    Raises:
        UserError: a tensor holds NaN or infinities.
    """
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad and not allow:
        raise UserError(
            f"{path}: not written: {len(bad)} of {len(state)} tensors are not finite, the first is "
            f"{bad[0]}; export an earlier checkpoint, or add --not-finite"
        )


def _versions(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        "jepa_dist": jepa_dist.__version__,
        "torch": torch.__version__,
        "parameters": str(sum(tensor.numel() for tensor in state.values())),
    }


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` create a file that is renamed to ``path`` when it is complete and on disk.

    Its mode is that of any new file (by the umask); safetensors would make it readable only by the
    owner.
    """
    partial = partial_name(path)
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- reading


def find_export(path: Path, weights: Weights) -> Path:
    """Return the tensor file of a run directory, an export's folder or a file name.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: expected a .safetensors file or a folder that holds one; "
                "python -m jepa_dist.interop.parameter_golf import reads final_model.pt"
            )
        return path
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or folder; expected a run directory or an exported model"
        )
    file = path / f"{_STEMS[weights]}.safetensors"
    if not file.is_file():
        reason = {
            "live": "a run writes it when it ends",
            "ema": "a run with optim.ema_decay > 0 writes it when it ends",
        }
        raise UserError(f"{path}: holds no {file.name}; {reason[weights]}")
    return file


def read_description(path: Path) -> Description:
    """Read the description of a tensor file.

    Raises:
        UserError: missing (an unfinished export), damaged, or of another format version.
    """
    return read_description_file(path.with_suffix(".json"))


def read_description_file(beside: Path) -> Description:
    """Read a description file.

    Raises:
        UserError: missing (an unfinished export), damaged, or of another format version.
    """
    try:
        description = Description.model_validate_json(read_bytes(beside, MIB))
    except OSError as error:
        raise UserError(
            f"{beside}: cannot be read ({error}); its export is incomplete, export the model again"
        ) from None
    except ValidationError as error:
        raise UserError(
            *(f"{beside}: {field}; export the model again" for field in invalid_fields(error))
        ) from None
    problems = check(description.config)
    if problems:
        raise UserError(*(f"{beside}: config: {problem}" for problem in problems))
    return description


def check_tensors(path: Path, model: nn.Module) -> None:
    """Compare a tensor file with a model (parameters may be on meta); reads its header only.

    Raises:
        UserError: damaged file; tensors missing, unknown, or of another shape or dtype; all listed.
    """
    expected = {
        name: Signature(tuple(parameter.shape), DTYPES[parameter.dtype])
        for name, parameter in model.named_parameters()
    }
    with TensorFile(path) as file:
        problems = mismatches(str(path), expected, file.signatures())
    if problems:
        raise UserError(*problems)


@torch.no_grad()
def import_weights(path: Path, model: nn.Module) -> None:
    """Fill a model's parameters, sharded or not; each rank reads its shards.

    Not collective. Parameters keep their device and must have the file's dtype.

    Raises:
        UserError: as ``check_tensors``, or the file was truncated meanwhile.
    """
    check_tensors(path, model)
    with TensorFile(path) as file:
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel() > 0:
                local.copy_(file.read(name, local_slices(parameter)))


def read_state(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, on the CPU.

    Raises:
        UserError: the file is damaged.
    """
    return dict(lazy_tensors(path))
