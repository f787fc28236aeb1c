"""Loss and bits per byte of a model over windows, distributed over ranks.

Exact for any number of ranks: batches are padded with rows that score nothing, and every rank runs
the same number of forward passes, as FSDP's collectives need.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.tokenizer import ByteCounter
from jepa_dist.evaluate.windows import Rows, Windows
from jepa_dist.parallel.world import World

_BATCHES_BETWEEN_POLLS = 8


@dataclass(frozen=True)
class Score:
    """Result of a model on an evaluation set; the same on every rank."""

    nll: float
    """Sum of all targets' negative log-likelihoods, in nats."""
    num_tokens: int
    """Scored targets."""
    num_bytes: int
    """Bytes of text of the targets; 0 if unknown."""

    @property
    def loss(self) -> float:
        """Mean over targets, in nats per token."""
        return self.nll / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; NaN if the targets have no text."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def add_scores(scores: Iterable[Score]) -> Score:
    """Return the score over the targets of all scores."""
    parts = list(scores)
    return Score(
        sum(part.nll for part in parts),
        sum(part.num_tokens for part in parts),
        sum(part.num_bytes for part in parts),
    )


class InterruptedEvaluationError(Exception):
    """The evaluation was stopped before its end."""


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Windows,
    *,
    phase: int,
    micro: int,
    bytes_of: ByteCounter | None,
    world: World,
    is_interrupted: Callable[[], bool] | None = None,
) -> Score:
    """Evaluate on all windows. Collective.

    Args:
        model: A GPT, sharded over ``world`` or the same on each rank.
        windows: Windows to evaluate on.
        phase: Recurrence phase of the model.
        micro: Rows of every forward pass.
        bytes_of: Counts the bytes of target tokens; None if unknown.
        world: Ranks that share the work.
        is_interrupted: Returns whether to stop; collective, called regularly on every rank.

    Raises:
        UserError: a token id outside the vocabulary.
        InterruptedEvaluationError: on every rank, if ``is_interrupted`` returned True.
    """
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    num_tokens = num_bytes = 0
    for index, rows in enumerate(_batches(windows, micro, world)):
        if is_interrupted is not None and index % _BATCHES_BETWEEN_POLLS == 0 and is_interrupted():
            raise InterruptedEvaluationError
        inputs, targets = rows.tokens[:, :-1], rows.tokens[:, 1:]
        nll += _nll(model, rows, windows.overlap, phase, world.device)
        num_tokens += int(rows.scored.sum())
        if bytes_of is not None:
            num_bytes += int((bytes_of.count(inputs, targets) * rows.scored).sum())
    # float64 represents both counts exactly.
    counts = torch.tensor([num_tokens, num_bytes], dtype=torch.float64, device=world.device)
    totals = torch.cat([nll[None], counts])
    if world.world_size > 1:
        dist.all_reduce(totals)
    total_nll, total_tokens, total_bytes = totals.tolist()
    return Score(total_nll, int(total_tokens), int(total_bytes))


def _batches(windows: Windows, micro: int, world: World) -> Iterator[Rows]:
    """Yield this rank's windows, ``micro`` at a time; the same number of batches on all ranks."""
    layout = BatchLayout(len(windows), micro, world.rank, world.world_size)
    with tqdm(
        total=layout.num_micro,
        desc="evaluating",
        unit="batch",
        leave=False,
        disable=not (world.is_main and sys.stderr.isatty()),
    ) as bar:
        for first in range(0, layout.num_micro * micro, micro):
            # Always the shape of training, even for the last rows, so that the graphs that
            # its warm-up compiled are reused.
            yield windows.read(layout.rows[first : first + micro], micro)
            bar.update()


def _nll(model: nn.Module, rows: Rows, overlap: bool, phase: int, device: torch.device) -> Tensor:
    """Return the sum over the scored targets of a batch, float64 scalar on the device."""
    tokens_BT, targets_BT = rows.tokens[:, :-1], rows.tokens[:, 1:]
    # Without overlap a row is scored completely or not at all, and weighted as in training.
    weight = rows.scored if overlap else rows.scored[:, 0]
    arrays = (tokens_BT, targets_BT, weight.astype(np.float32))
    output = model(*(_on_device(array, device) for array in arrays), phase=phase)
    return output.loss_sum.double()


def _on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a copy on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
