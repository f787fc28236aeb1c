"""Forward passes over rows of token ids of different lengths: log-likelihoods and pooled states.

Rows are sorted by length and divided into batches before they are distributed over ranks, so a row
is always computed in the same batch, padded to the same length: results are bitwise identical on
any number of ranks. No sum runs over more than one row, and those over a row's positions are exact
(``math.fsum``). The passes are not compiled: their shapes differ from those of training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from jepa_dist.config import Config
from jepa_dist.model.gpt import Output

Ids = Sequence[int]
Floats = npt.NDArray[np.float64]

_LENGTH_STEP = 32  # rows are padded to a multiple, so that few shapes occur
_MOST_LOGITS = 2**25  # per batch: 128 MiB in float32, about three copies in memory


class Request(NamedTuple):
    """Token ids to compute the log-likelihood of."""

    context: Ids
    """At least one id; truncated at the start if it does not fit into the model."""
    target: Ids
    """At least one id, at most ``model.seq_len``."""

    def is_cut(self, seq_len: int) -> bool:
        """Return whether the context is truncated."""
        return len(self.context) + len(self.target) > seq_len + 1


class Likelihoods(NamedTuple):
    """Log-likelihoods of N requests, in the order of the requests."""

    total_N: Floats
    """Sum over the target's tokens, in nats."""
    greedy_N: npt.NDArray[np.bool_]
    """Whether every token of the target is the model's most likely one."""


@dataclass(frozen=True)
class Passes:
    """Passes over a model, distributed over ranks.

    Attributes:
        model: A GPT, sharded over the ranks or the same on each.
        config: Its configuration; ``batch.micro`` is the maximum number of rows of a pass.
        phase: Recurrence phase to run it in.
        device: Where it is.
        rank: This rank.
        world_size: Ranks that share the work; all of them call the same methods (collective).
    """

    model: nn.Module
    config: Config
    phase: int
    device: torch.device
    rank: int = 0
    world_size: int = 1

    def log_likelihoods(self, requests: Sequence[Request], title: str = "") -> Likelihoods:
        """Return the log-likelihood of each target after its context. Collective.

        Args:
            requests: Requests to score.
            title: Label of the progress bar.
        """
        longest = self.config.model.seq_len + 1
        rows = [[*context, *target][-longest:] for context, target in requests]

        def read(output: Output, batch: list[int]) -> Floats:
            assert output.logits_BTV is not None
            targets = _padded([rows[index][1:] for index in batch], output.logits_BTV.size(1))
            scores_BT, is_best_BT = _score(output.logits_BTV, targets.to(self.device))
            values = np.empty((len(batch), 2))
            for place, index in enumerate(batch):
                stop = len(rows[index]) - 1
                scored = slice(stop - len(requests[index].target), stop)
                values[place] = math.fsum(scores_BT[place, scored]), is_best_BT[place, scored].all()
            return values

        found = self._run([row[:-1] for row in rows], (), 2, read, title)
        return Likelihoods(found[:, 0], found[:, 1] == 1)

    def mean_states(self, rows: Sequence[Ids], layer: int, title: str = "") -> Floats:
        """Return the mean over each row's positions of the hidden states, [N, D]. Collective.

        Args:
            rows: Token ids, at least one and at most ``model.seq_len`` in each row.
            layer: Block whose output to take, at its last execution; -1: the final state.
            title: Label of the progress bar.
        """

        def read(output: Output, batch: list[int]) -> Floats:
            states_BTD = output.taps[0].double().cpu().numpy()
            means = [states_BTD[place, : len(rows[i])].mean(0) for place, i in enumerate(batch)]
            return np.stack(means)

        return self._run(rows, (layer,), self.config.model.model_dim, read, title)

    @torch.no_grad()
    def states(self, rows: Sequence[Ids], layer: int) -> Tensor:
        """Return the hidden states of rows of one length, float32 [B, T, D] on the CPU. Collective.

        Every rank computes all of them, so use it for few rows.
        """
        found = []
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(rows), self.config.batch.micro):
                tokens_BT = torch.tensor(rows[start : start + self.config.batch.micro])
                output = self.model(tokens_BT.to(self.device), phase=self.phase, taps=(layer,))
                found.append(output.taps[0].float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _run(
        self,
        rows: Sequence[Ids],
        taps: tuple[int, ...],
        width: int,
        read: Callable[[Output, list[int]], Floats],
        title: str,
    ) -> Floats:
        """Return the result of ``read`` for each row, [N, width]; the same on every rank."""
        results = np.zeros((len(rows), width))
        batches = self._batches(rows)
        rounds = -(-len(batches) // self.world_size)
        with torch.compiler.set_stance("force_eager"):
            for index in self._progress(rounds, title):
                # A rank without a batch left repeats the last one: FSDP's collectives need it.
                batch = batches[min(index, len(batches) - 1)]
                tokens_BT = _padded([rows[i] for i in batch], self._padded_length(rows, batch))
                output = self.model(tokens_BT.to(self.device), phase=self.phase, taps=taps)
                if index < len(batches):
                    results[batch] = read(output, batch)
        if self.world_size > 1:  # every row is zero on all ranks except one
            summed = torch.from_numpy(results).to(self.device)
            dist.all_reduce(summed)
            results = summed.cpu().numpy()
        return results

    def _batches(self, rows: Sequence[Ids]) -> list[list[int]]:
        """Return the indices of the rows of each pass, longest rows first."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        batches = []
        while order:
            length = self._padded_length(rows, order[:1])
            fitting = max(1, _MOST_LOGITS // (length * self.config.model.vocab_size))
            size = min(self.config.batch.micro, fitting)
            batches.append(order[:size])
            order = order[size:]
        return batches

    def _padded_length(self, rows: Sequence[Ids], batch: list[int]) -> int:
        longest = max(len(rows[index]) for index in batch)
        # Not above seq_len, where the rotary base would change.
        return min(self.config.model.seq_len, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)

    def _progress(self, rounds: int, title: str) -> tqdm[int]:
        """Return the indices of this rank's batches, with a progress bar on rank 0."""
        return tqdm(
            range(self.rank, rounds * self.world_size, self.world_size),
            desc=title or "scoring",
            unit="batch",
            leave=False,
            disable=not (self.rank == 0 and sys.stderr.isatty()),
        )


def _padded(rows: Sequence[Ids], length: int) -> Tensor:
    """Return the rows, padded with zeros at their ends, int64 [B, T]."""
    padded = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row)
    return padded


def _score(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return each target's log-probability, and whether it is the most likely token, [B, T]."""
    logits_BT = logits_BTV.gather(2, targets_BT[..., None])[..., 0]
    scores_BT = logits_BT.double() - logits_BTV.logsumexp(2).double()
    is_best_BT = logits_BTV.argmax(2) == targets_BT
    return scores_BT.cpu().numpy(), is_best_BT.cpu().numpy()
