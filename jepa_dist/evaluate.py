"""Validation on a fixed set of windows, sharded over ranks, exact for any number of them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import TokenDataset
from jepa_dist.data.tokenizer import ByteCounter
from jepa_dist.parallel.world import World


class Validation:
    """Loss and bits per byte over the first ``sequences`` windows of a data set.

    Args:
        dataset: Validation windows; read in order.
        sequences: How many of them; 0 takes all.
        micro: Most windows in one forward pass.
        bytes_of: Counts the bytes that target tokens stand for.
        world: Ranks that share the work.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequences: int,
        micro: int,
        bytes_of: ByteCounter,
        world: World,
    ) -> None:
        self._dataset = dataset
        self._world = world
        self.num_sequences = min(sequences or len(dataset), len(dataset))
        self._layout = BatchLayout(self.num_sequences, micro, world.rank, world.world_size)
        self._bytes_of = bytes_of
        self._num_bytes: int | None = None

    def windows(self) -> np.ndarray:
        """All windows of the validation set, int64 [N, T+1]."""
        return self._dataset.read(np.arange(self.num_sequences))

    @torch.no_grad()
    def run(self, model: nn.Module, phase: int) -> dict[str, float]:
        """Evaluate in recurrence ``phase``; the same result on every rank. Collective.

        Returns:
            ``val/loss`` (nats per token) and ``val/bpb`` (bits per byte).
        """
        nll = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for index in range(self._layout.num_micro):
            tokens_BT, targets_BT, weight_B = self._micro_batch(index)
            output = model(tokens_BT, targets_BT, weight_B, phase=phase)
            nll += output.loss_sum.double()
        if self._world.world_size > 1:
            dist.all_reduce(nll)
        num_tokens = self.num_sequences * self._dataset.seq_len
        loss = nll.item() / num_tokens
        bits_per_byte = nll.item() / math.log(2) / self._count_bytes()
        return {"val/loss": loss, "val/bpb": bits_per_byte}

    def _micro_batch(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and targets [M, T] and row weights [M]; padding repeats window 0, weight 0."""
        real = self._layout.micro_rows(index)
        ids = np.zeros(self._layout.micro_size, dtype=np.int64)
        ids[: len(real)] = real
        weight_B = torch.zeros(self._layout.micro_size)
        weight_B[: len(real)] = 1.0
        windows = torch.from_numpy(self._dataset.read(ids)).to(self._world.device)
        return (
            windows[:, :-1].contiguous(),
            windows[:, 1:].contiguous(),
            weight_B.to(self._world.device),
        )

    def _count_bytes(self) -> int:
        """Bytes of all targets; counted once, on every rank alike."""
        if self._num_bytes is None:
            total = 0
            for start in range(0, self.num_sequences, 1024):
                stop = min(start + 1024, self.num_sequences)
                windows = self._dataset.read(np.arange(start, stop))
                total += int(self._bytes_of.count(windows[:, :-1], windows[:, 1:]).sum())
            self._num_bytes = total
        return self._num_bytes
