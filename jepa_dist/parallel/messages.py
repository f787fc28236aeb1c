"""Values that ranks send each other, as JSON; PyTorch's object collectives send pickles.

A value is dicts with text keys, lists, text, numbers, booleans and None. Every rank, the sender
included, gets what JSON makes of it: tuples become lists.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_BYTES = 1 << 26
"""Longest value of one rank, as UTF-8."""


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's ``value``, in rank order. Collective.

    Args:
        value: This rank's.
        group: A group of all ranks that takes CPU tensors.

    Raises:
        TypeError: on this rank, if its value is not JSON.
        RuntimeError: on every rank, naming the rank, if a value is too long.
    """
    mine = _encode(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([mine.numel()]), group=group)
    counts = [int(length) for length in lengths]
    for rank, count in enumerate(counts):
        _check_length(count, rank)
    padded = torch.zeros(max(counts), dtype=torch.uint8)
    padded[: mine.numel()] = mine
    values = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(values, padded, group=group)
    return [
        _decode(each[:count], rank)
        for rank, (each, count) in enumerate(zip(values, counts, strict=True))
    ]


def broadcast_json(value: Any, group: dist.ProcessGroup) -> Any:
    """Return rank 0's ``value``. Collective.

    Args:
        value: Rank 0's; ignored on the others.
        group: A group of all ranks that takes CPU tensors.

    Raises:
        TypeError: on rank 0, if its value is not JSON.
        RuntimeError: on every rank, if it is too long.
    """
    is_sender = dist.get_rank(group) == 0
    sent = _encode(value) if is_sender else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([sent.numel()])
    dist.broadcast(length, 0, group=group)
    count = int(length)
    _check_length(count, 0)
    if not is_sender:
        sent = torch.empty(count, dtype=torch.uint8)
    dist.broadcast(sent, 0, group=group)
    return _decode(sent, 0)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(octets: Tensor, rank: int) -> Any:
    try:
        return json.loads(octets.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"messages between ranks: rank {rank} sent no JSON: {error}") from None


def _check_length(count: int, rank: int) -> None:
    if not 0 < count <= MOST_BYTES:
        raise RuntimeError(
            f"messages between ranks: rank {rank} sends {count} bytes; expected 1 to {MOST_BYTES}"
        )
