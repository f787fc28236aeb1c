"""Check that all replicas hold identical bits: no later check would detect a difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.errors import TrainingError
from jepa_dist.parallel.world import World


def check_replicas(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare a checksum of every tensor's bits between the ranks that hold the same part of it.

    Each replica updates its own copy from the same gradients, so a difference at the start of
    training persists to its end. Collective; waits for the device.

    Args:
        tensors: DTensors or unsharded tensors by name; the same names on every rank.
        world: The ranks; with one replica only the unsharded tensors are compared.

    Raises:
        TrainingError: on every rank, naming the tensors and the ranks that differ.
    """
    if world.world_size == 1:
        return
    of_ranks = world.gather({name: [_part(t), _checksum(t)] for name, t in tensors.items()})
    differences = []
    for name in tensors:
        by_part: dict[tuple[int, ...], dict[int, list[str]]] = {}
        for rank, sums in enumerate(of_ranks):
            part, checksum = sums[name]
            by_part.setdefault(tuple(part), {}).setdefault(checksum, []).append(str(rank))
        for of_part in by_part.values():
            if len(of_part) > 1:
                sides = " against ".join(", ".join(ranks) for ranks in of_part.values())
                differences.append(f"{name} (ranks {sides})")
    if differences:
        raise TrainingError(
            f"replicas differ before training: {'; '.join(differences)}; expected identical bits; "
            "check the devices of these ranks for memory errors, and the versions of torch and of "
            "this code"
        )


def _part(tensor: Tensor) -> tuple[int, ...]:
    """Return this rank's coordinates on the mesh dimensions that shard the tensor."""
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
    """Return a checksum, modulo 2**64, of the bits of this rank's part and their order."""
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    octets = shard.detach().contiguous().flatten().view(torch.uint8)
    bits = octets.view(torch.int32) if octets.numel() % 4 == 0 else octets
    weights = 2 * torch.arange(bits.numel(), device=bits.device) + 1  # odd: no bit is lost
    return int((bits * weights).sum())
