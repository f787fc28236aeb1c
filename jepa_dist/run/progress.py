"""Progress of a run: its state apart from tensors, as stored in a checkpoint's ``state.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from jepa_dist.errors import UserError, invalid_fields

# A step plan carries integers as float64.
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Digest = Annotated[str, Field(pattern="^([0-9a-f]{32})?$")]


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Progress:
    """A run's state apart from its tensors (exact resume); independent of the number of ranks."""

    step: _Count = 0
    """Completed optimizer steps."""
    samples_consumed: _Count = 0
    phase: Annotated[int, Field(ge=0, le=2)] = 0
    """Recurrence phase of the last step."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Training time, summed over all starts of the run."""
    tokens_digest: _Digest = ""
    spans_digest: _Digest = ""
    skip_start: _Count = 0
    """Start and length of the sample range that the run skips after a roll-back."""
    skip_count: _Count = 0
    bad_steps: _Count = 0
    """Steps whose update was skipped because the loss or gradient was not finite."""
    bad_in_row: _Count = 0
    """Consecutive bad steps up to the last one; stored so that a run that is interrupted often
    still reaches the number at which it rolls back."""
    bad_row_sample: _Count = 0
    """``samples_consumed`` before the first of these consecutive bad steps."""

    @property
    def skip(self) -> range:
        """Skipped samples, as indices in the training order."""
        return range(self.skip_start, self.skip_start + self.skip_count)


# Newer versions write more keys; the ones that every version has written are required.
_REQUIRED = ("step", "samples_consumed", "phase", "seconds", "tokens_digest", "spans_digest")


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    config: dict[str, Any]
    data_fingerprint: str
    validation_fingerprint: str | None = None


@dataclass(frozen=True)
class RunState:
    """Contents of the ``state.json`` of a run's checkpoint."""

    progress: Progress
    config: Mapping[str, Any]
    """The resolved configuration; may have keys of another version."""
    data_fingerprint: str
    """Digest of the training data."""
    validation_fingerprint: str | None
    """Identifies the validation data; None in checkpoints of versions that did not store it."""


def progress_of(file: Path, state: Mapping[str, Any]) -> Progress:
    """Return the ``Progress`` stored in ``state``, the contents of ``file``.

    Raises:
        UserError: one line for each key that is missing or has an invalid value.
    """
    missing = [f"{file}: {key}: missing; {_REMEDY}" for key in _REQUIRED if key not in state]
    if missing:
        raise UserError(*missing)
    known = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
    try:
        return Progress(**known)
    except ValidationError as error:
        raise UserError(*_explain(file, error)) from None


def run_state(file: Path, state: Mapping[str, Any]) -> RunState:
    """Return the ``RunState`` stored in ``state``, the contents of ``file``.

    Raises:
        UserError: as ``progress_of``.
    """
    progress = progress_of(file, state)
    try:
        identity = _Identity.model_validate(state)
    except ValidationError as error:
        raise UserError(*_explain(file, error)) from None
    return RunState(
        progress, identity.config, identity.data_fingerprint, identity.validation_fingerprint
    )


_REMEDY = "not the state of a training run; use another checkpoint"


def _explain(file: Path, error: ValidationError) -> list[str]:
    return [f"{file}: {field}; {_REMEDY}" for field in invalid_fields(error)]
