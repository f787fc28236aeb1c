"""Loss and bits per byte of a model over windows, shared out over ranks.

Exact for any number of ranks: windows that do not divide are filled up with rows that score
nothing, and every rank runs the same number of forward passes, as FSDP's collectives need.
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
    """What a model achieved on an evaluation set; the same on every rank."""

    nll: float
    """Sum of all targets' negative log-likelihoods, in nats."""
    num_tokens: int
    """Scored targets."""
    num_bytes: int
    """Bytes of text that they stand for; 0 if that is not known."""

    @property
    def loss(self) -> float:
        """Mean over targets, nats per token."""
        return self.nll / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; not a number where the targets stand for no text at all."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def add_scores(scores: Iterable[Score]) -> Score:
    """Return the score over the targets of all of them."""
    parts = list(scores)
    return Score(
        sum(part.nll for part in parts),
        sum(part.num_tokens for part in parts),
        sum(part.num_bytes for part in parts),
    )


class InterruptedEvaluationError(Exception):
    """The evaluation was given up before its end."""


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
        windows: What to evaluate on.
        phase: Recurrence phase of the model.
        micro: Rows of every forward pass.
        bytes_of: Counts the bytes that target tokens stand for; None if nobody knows.
        world: Ranks that share the work.
        is_interrupted: Asked now and then, on every rank alike (it is collective), whether to
            give up.

    Raises:
        UserError: a token id outside the vocabulary.
        InterruptedEvaluationError: on every rank, when ``is_interrupted`` said so.
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
    # float64 holds both counts exactly.
    counts = torch.tensor([num_tokens, num_bytes], dtype=torch.float64, device=world.device)
    totals = torch.cat([nll[None], counts])
    if world.world_size > 1:
        dist.all_reduce(totals)
    total_nll, total_tokens, total_bytes = totals.tolist()
    return Score(total_nll, int(total_tokens), int(total_bytes))


def _batches(windows: Windows, micro: int, world: World) -> Iterator[Rows]:
    """This rank's windows, ``micro`` at a time; as many batches on every rank."""
    layout = BatchLayout(len(windows), micro, world.rank, world.world_size)
    with tqdm(
        total=layout.num_micro,
        desc="evaluating",
        unit="batch",
        leave=False,
        disable=not (world.is_main and sys.stderr.isatty()),
    ) as bar:
        for first in range(0, layout.num_micro * micro, micro):
            # Always of the same shape, that of training, however few are left: the graphs that
            # its warm-up compiled serve here too.
            yield windows.read(layout.rows[first : first + micro], micro)
            bar.update()


def _nll(model: nn.Module, rows: Rows, overlap: bool, phase: int, device: torch.device) -> Tensor:
    """Summed over the scored targets of one batch, float64 scalar on the device."""
    tokens_BT, targets_BT = rows.tokens[:, :-1], rows.tokens[:, 1:]
    # Without overlap a row counts whole or not at all, and is weighted as in training.
    weight = rows.scored if overlap else rows.scored[:, 0]
    arrays = (tokens_BT, targets_BT, weight.astype(np.float32))
    output = model(*(_on_device(array, device) for array in arrays), phase=phase)
    return output.loss_sum.double()


def _on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
