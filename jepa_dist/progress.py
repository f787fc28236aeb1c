"""How far a run is: the part of its state that is not tensors, and what a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from jepa_dist.errors import UserError, invalid_fields

# A step plan carries integers as float64.
_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Digest = Annotated[str, Field(pattern="^([0-9a-f]{32})?$")]


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Progress:
    """How far a run is, besides its tensors (contract C5); nothing in it depends on the ranks."""

    step: _Whole = 0
    """Optimiser steps done."""
    samples_consumed: _Whole = 0
    phase: Annotated[int, Field(ge=0, le=2)] = 0
    """Recurrence phase of the last step."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Training time spent, over all starts of the run."""
    tokens_digest: _Digest = ""
    spans_digest: _Digest = ""
    skip_start: _Whole = 0
    """Of the one stretch of samples that the run passed over when it rolled back."""
    skip_count: _Whole = 0
    bad_steps: _Whole = 0
    """Steps whose update was skipped, because loss or gradient was not finite."""
    bad_in_row: _Whole = 0
    """Those of them that the last steps are; a run that is interrupted often rolls back, too."""
    bad_row_sample: _Whole = 0
    """First sample of that row, in samples consumed before it."""

    @property
    def skip(self) -> range:
        """Samples passed over, as places in the order."""
        return range(self.skip_start, self.skip_start + self.skip_count)


# Later versions of the state have more keys; those that every version has are required.
_REQUIRED = ("step", "samples_consumed", "phase", "seconds", "tokens_digest", "spans_digest")


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    config: dict[str, Any]
    data_fingerprint: str
    validation_fingerprint: str | None = None


@dataclass(frozen=True)
class RunState:
    """What the ``state.json`` of a run's checkpoint says."""

    progress: Progress
    config: Mapping[str, Any]
    """As it was resolved; keys may be those of another version."""
    data_fingerprint: str
    """Of the training data."""
    validation_fingerprint: str | None
    """Of what the run is validated on; None in checkpoints that do not say."""


def progress_of(file: Path, state: Mapping[str, Any]) -> Progress:
    """How far the run is that left ``state`` in ``file``.

    Raises:
        UserError: keys that are missing or hold what no run writes; one line each.
    """
    missing = [f"{file}: {key}: missing; {_REMEDY}" for key in _REQUIRED if key not in state]
    if missing:
        raise UserError(*missing)
    known = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
    try:
        return Progress(**known)
    except ValidationError as error:
        raise UserError(*_told(file, error)) from None


def run_state(file: Path, state: Mapping[str, Any]) -> RunState:
    """What ``state`` says of the run that left it in ``file``.

    Raises:
        UserError: as ``progress_of``.
    """
    progress = progress_of(file, state)
    try:
        identity = _Identity.model_validate(state)
    except ValidationError as error:
        raise UserError(*_told(file, error)) from None
    return RunState(
        progress, identity.config, identity.data_fingerprint, identity.validation_fingerprint
    )


_REMEDY = "not the state of a training run; use another checkpoint"


def _told(file: Path, error: ValidationError) -> list[str]:
    return [f"{file}: {field}; {_REMEDY}" for field in invalid_fields(error)]
