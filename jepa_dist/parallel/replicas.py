"""Whether all replicas hold the same bits: nothing later would show that they do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.errors import TrainingError
from jepa_dist.parallel.world import World


def check_replicas(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare a checksum of every tensor's bits between the ranks that hold the same part of it.

    Each replica updates its own copy from the same gradients, so what differs at the start of
    training differs to its end. Collective; waits for the device.

    Args:
        tensors: By name: DTensors, or tensors that every rank holds whole; the same on every rank.
        world: The ranks; with one replica only the whole tensors are compared.

    Raises:
        TrainingError: on every rank, naming the tensors and the ranks that differ.
    """
    if world.world_size == 1:
        return
    of_ranks = world.gather({name: (_part(t), _checksum(t)) for name, t in tensors.items()})
    differences = []
    for name in tensors:
        by_part: dict[tuple[int, ...], dict[int, list[str]]] = {}
        for rank, sums in enumerate(of_ranks):
            part, checksum = sums[name]
            by_part.setdefault(part, {}).setdefault(checksum, []).append(str(rank))
        for of_part in by_part.values():
            if len(of_part) > 1:
                sides = " against ".join(", ".join(ranks) for ranks in of_part.values())
                differences.append(f"{name} (ranks {sides})")
    if differences:
        raise TrainingError(
            f"replicas differ before training: {'; '.join(differences)}; expected the same bits; "
            "look for memory errors on the devices of these ranks, and for ranks that run another "
            "version of torch or of this code"
        )


def _part(tensor: Tensor) -> tuple[int, ...]:
    """Which part of the tensor this rank holds: its coordinates on what shards it."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        place
        for place, placement in zip(coordinate, tensor.placements, strict=True)
        if not placement.is_replicate()
    )


def _checksum(tensor: Tensor) -> int:
    """Of the bits of this rank's part and their order, modulo 2**64."""
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    octets = shard.detach().contiguous().flatten().view(torch.uint8)
    bits = octets.view(torch.int32) if octets.numel() % 4 == 0 else octets
    weights = 2 * torch.arange(bits.numel(), device=bits.device) + 1  # odd: no bit is lost
    return int((bits * weights).sum())
