"""The format of ``evaluation.json``: accuracy in likelihood tasks and of a linear probe, and what
quantization costs."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_dist.config import QuantizationConfig
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.files import MIB, open_regular, read_bytes, write_atomically

EVALUATION = "evaluation.json"
"""Name of the file in a run directory."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
# Name of a task file without suffix; printed in tables.
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f/]{1,200}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TaskResult(_Strict):
    """Result of a model in a likelihood task."""

    digest: str
    """``digest_of`` the task's file."""
    items: Annotated[int, Field(ge=1)]
    accuracy: Share
    """Share of items whose right choice has the largest log-likelihood."""
    accuracy_per_byte: Share
    """The same by log-likelihood per byte of the choice."""
    chance: Share
    """Mean of 1 / (number of choices)."""
    cut: Count
    """Items whose context was truncated at its start to fit into the model."""

    def error(self, share: float) -> float:
        """Return the binomial standard error of a share of the items."""
        return math.sqrt(share * (1 - share) / self.items)


class ProbeResult(_Strict):
    """Result of a linear classifier on the hidden states."""

    digest: str
    """``digest_of`` the file of labeled documents."""
    layer: Annotated[int, Field(ge=-1)]
    classes: Annotated[int, Field(ge=2)]
    train_documents: Count
    test_documents: Annotated[int, Field(ge=1)]
    accuracy: Share
    """Accuracy on the test documents."""
    interval: tuple[Share, Share]
    """95 % bootstrap interval over the test documents."""
    chance: Share
    """Accuracy of always answering the most frequent label."""
    cut: Count
    """Documents whose end was truncated."""
    effective_rank: float | None = None
    """Effective rank of the first full windows' states (``objectives.diagnostics``), if any."""
    mean_cosine: float | None = None
    """Mean cosine of all pairs of these states: anisotropy."""


class QuantizedResult(_Strict):
    """Result of a model on its validation set, after and before quantization."""

    settings: QuantizationConfig
    """``matrix_bits`` is the width; each width has its own result."""
    matrices: Annotated[int, Field(ge=1)]
    """Number of matrices that are quantized."""
    validated_on: str
    """Identifies the validation set, as ``val/set`` in metrics.jsonl."""
    loss: float
    """After quantization, nats per token."""
    full_loss: float
    """Before quantization, computed in the same way."""
    bits_per_byte: float | None
    """After quantization; None without a tokenizer that counts bytes."""
    full_bits_per_byte: float | None

    @property
    def name(self) -> str:
        """Prefix of its metrics' names."""
        return quantized_name(self.settings.matrix_bits)

    def metrics(self) -> dict[str, float]:
        """Return the loss after quantization and by how much it is larger than before, by metric
        name: in bits per byte if both are known, else in nats per token."""
        if self.bits_per_byte is None or self.full_bits_per_byte is None:
            kind, value, before = "val/loss", self.loss, self.full_loss
        else:
            kind, value, before = "val/bpb", self.bits_per_byte, self.full_bits_per_byte
        return {f"{self.name}/{kind}": value, f"{self.name}/gap": value - before}


class Evaluation(_Strict):
    """Contents of the file."""

    format: Literal[1] = 1
    step: int | None
    """Optimizer steps that the weights have seen."""
    weights: Literal["live", "ema"]
    tasks: dict[Name, TaskResult] = Field(default_factory=dict)
    probes: dict[Name, ProbeResult] = Field(default_factory=dict)
    quantized: list[QuantizedResult] = Field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return all results by metric name."""
        found = {}
        for name, task in self.tasks.items():
            found[f"task/{name}"] = task.accuracy
            found[f"task/{name}/per_byte"] = task.accuracy_per_byte
        for name, probe in self.probes.items():
            found[f"linear_probe/{name}"] = probe.accuracy
            if probe.effective_rank is not None and probe.mean_cosine is not None:
                found[f"states/{name}/effective_rank"] = probe.effective_rank
                found[f"states/{name}/mean_cosine"] = probe.mean_cosine
        for quantized in self.quantized:
            found |= quantized.metrics()
        return found

    def inputs(self) -> dict[str, str]:
        """Return the file (and layer) of each task and probe, and the settings of each
        quantization, by the prefix of the metrics' names."""
        found = {f"task/{name}": one.digest for name, one in self.tasks.items()}
        probes = self.probes.items()
        found |= {f"linear_probe/{name}": f"{one.digest} {one.layer}" for name, one in probes}
        return found | {one.name: quantized_input(one.settings) for one in self.quantized}

    def input_of(self, metric: str) -> str | None:
        """Return what a metric of ``metrics`` was computed on: its entry of ``inputs``, and the
        validation set after quantization."""
        kind, name = metric.split("/")[:2]
        for one in self.quantized:
            if f"{kind}/{name}" == one.name:
                return f"{self.inputs()[one.name]} {one.validated_on}"
        return self.inputs().get(f"linear_probe/{name}" if kind == "states" else f"{kind}/{name}")


def quantized_name(bits: int) -> str:
    """Return the prefix of the names of the metrics after quantization to ``bits``."""
    return f"quantized/{bits}_bits"


def quantized_input(settings: QuantizationConfig) -> str:
    """Return the entry of ``Evaluation.inputs`` for a quantization with these settings."""
    return settings.model_dump_json()


def digest_of(path: Path) -> str:
    """Return what identifies the contents of a task's or a probe's file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the file atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, evaluation.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def read_evaluation(path: Path) -> Evaluation | None:
    """Return the file's contents; None if there is no such file.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        return Evaluation.model_validate_json(read_bytes(path, MIB))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: {invalid_fields(error)[0]}; remove it and evaluate again"
        ) from None
