"""The interface between the training core and an objective.

An objective and the GPT are modules of the trained root (``joint.JointModel``). Its
parameters are sharded by FSDP in the root's unit, so they add no collective; they are in the
optimizer's groups (``optim/groups.py``), in the moving average and in checkpoints under
``objective/NAME``, but not in exported models. ``docs/objective.md`` describes how to add one.

Tensor names carry their shape: B batch, T sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jepa_dist.config import Config
from jepa_dist.model.gpt import OutputLayer
from jepa_dist.model.init import fan_in_uniform
from jepa_dist.objectives.probe import TapProbe

Samples: TypeAlias = NDArray[np.int64]
Sampler: TypeAlias = Callable[[int], Samples]
"""Returns the samples of a step for the global batch, [rows, ...]; a pure function of the step."""
DocumentStarts: TypeAlias = Callable[[int], NDArray[np.bool_]]
"""Returns where documents begin in the rows of a step's global batch, bool [rows, T]."""

PREFIX = "objective"
"""Prefix of the names of the objective's tensors."""


class Sums(NamedTuple):
    """Sums over the given rows, which add up over micro-batches and ranks."""

    loss: Tensor
    """Row weight times the loss of the row, summed; scalar, at least float32."""
    parts: dict[str, Tensor]
    """Further sums that the metrics need: float32 scalars by name, detached."""


class Objective(nn.Module):
    """An auxiliary loss on the model's hidden states. Subclasses override what they need.

    ``forward`` is a compile region: one graph. Values that change during a run must not be
    constants of it, and it must not communicate.

    Args:
        config: The run.
        bos_id: Id that begins every document; None if it is not known.
    """

    def __init__(self, config: Config, bos_id: int | None) -> None:
        super().__init__()
        self.config = config

    # ------------------------------------------------------------------ sampling on rank 0

    @classmethod
    def sample_shape(cls, config: Config) -> tuple[int, ...] | None:
        """Return the shape of the samples per row of the global batch; None: no samples."""
        return None

    @classmethod
    def reads_documents(cls, config: Config) -> bool:
        """Return whether sampling needs to know where documents begin."""
        return False

    @classmethod
    def sampler(cls, config: Config, documents: DocumentStarts | None) -> Sampler:
        """Return the function that samples on rank 0; called if ``sample_shape`` is not None.

        Args:
            config: The run.
            documents: Where documents begin, if ``reads_documents``.
        """
        raise NotImplementedError

    @classmethod
    def num_rows(cls, config: Config, samples: Samples | None) -> int:
        """Return the number of rows of the global batch that the loss is a mean over."""
        return config.batch.sequences

    # ------------------------------------------------------------------ the loss

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose states are read, in this order, as ``GPT.forward`` names them.

        The objective's gradient is measured at the first one.
        """
        raise NotImplementedError

    @property
    def reads_output_layer(self) -> bool:
        """Whether ``forward`` is given the model's output layer."""
        return False

    def forward(
        self,
        states: Sequence[Tensor],
        tokens_BT: Tensor,
        weight_B: Tensor,
        samples: Tensor | None,
        output_layer: OutputLayer | None = None,
    ) -> Sums:
        """Return the loss summed over the given rows.

        Args:
            states: The hidden states of ``taps``, [B, T, D] each, in the activations' dtype.
            tokens_BT: int64 input ids.
            weight_B: float32 weight of each row (0 for padding).
            samples: int64 [B, ...], these rows of the samples (zeros for padding rows).
            output_layer: Without gradient, if ``reads_output_layer``.
        """
        raise NotImplementedError

    def initial_value(
        self, name: str, shape: torch.Size, *, seed: int, device: torch.device
    ) -> Tensor:
        """Return the full initial tensor of a parameter, float32; a function of seed and name.

        The default is uniform within 1/sqrt(fan-in).
        """
        return fan_in_uniform(f"{PREFIX}.{name}", shape, seed, device)

    # ------------------------------------------------------------------ metrics

    def metrics(self, samples: Samples | None, values: Mapping[str, float]) -> dict[str, float]:
        """Return ``jepa/*`` metrics of a step in which the objective was on.

        Args:
            samples: Samples of the step.
            values: ``jepa``, the mean loss, and the sums of ``Sums.parts`` over all ranks.
        """
        return {}

    @property
    def flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward per trained token (as in ``model/flops.py``)."""
        return 0.0

    def probe(self, bos_id: int | None, device: torch.device) -> TapProbe:
        """Return the probe that measures the objective's diagnostics (docs/objective.md)."""
        return TapProbe()


class NoObjective(Objective):
    """The absent objective (``jepa.lambda`` is 0): reads and samples nothing, is never called."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Return no layer."""
        return ()


def continues_document(tokens: Tensor, bos_id: int | None) -> Tensor:
    """Return 1.0 where a token continues a document, 0.0 where it begins one: float32.

    Args:
        tokens: Ids, of any shape, which is the result's as well.
        bos_id: Id that begins every document; None: all tokens continue one.
    """
    if bos_id is None:
        return torch.ones_like(tokens, dtype=torch.float32)
    return (tokens != bos_id).float()


def is_objectives(tensor: str) -> bool:
    """Return whether a checkpoint's tensor (KIND/NAME) belongs to the objective or its state."""
    kind, _, name = tensor.partition("/")
    return kind == PREFIX or name.startswith(f"{PREFIX}.")
