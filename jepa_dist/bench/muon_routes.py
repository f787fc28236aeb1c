"""A step of Muon on sharded matrices in three ways, on real ranks of this machine.

``owner`` is this package's: each matrix is sent to one rank, and its result back
(``jepa_dist.optim.muon``). ``all_gather`` gathers every matrix on every rank, and every rank
orthogonalizes all of them. ``torch`` is ``torch.optim.Muon`` on DTensors. All three iterate in
bfloat16, without row normalization, which ``torch.optim.Muon`` does not have.

Bytes are those sent by a rank per step, counted as in ``jepa_dist.bench.collectives``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from jepa_dist.bench.collectives import CollectiveCounter
from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    on_ranks,
    refuse_launcher,
    time_interleaved,
)
from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.model.gpt import GPT
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.local_shards import local, rows_of_shard
from jepa_dist.optim.muon import Muon, MuonSettings

_SETTINGS = MuonSettings(row_normalize=False, dtype=torch.bfloat16)
_BYTES = torch.bfloat16.itemsize
_LR, _WEIGHT_DECAY = 0.02, 0.1

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Setup:
    """Settings of the measurement; the same on every rank."""

    shapes: Mapping[str, tuple[int, int]]
    replicas: int
    rounds: int


# ---------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench muon``."""
    add_config(parser)
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default: 2 4; with CUDA one per device"
    )
    parser.add_argument(
        "--replicas", type=int, default=1, help="replicas of the sharded matrices (HSDP)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each route")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="time limit in seconds for a group of ranks"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all routes at each number of ranks.

    Raises:
        UserError: ranks that do not match this machine or the replicas, or that take too long.
    """
    refuse_launcher("muon")
    groups = arguments.ranks or [torch.cuda.device_count()] * torch.cuda.is_available() or [2, 4]
    _check(groups, arguments.replicas, arguments.rounds)
    shapes = matrix_shapes(chosen_config(arguments))
    setup = Setup(shapes, arguments.replicas, arguments.rounds)
    return {
        "config": str(arguments.config),
        "matrices": len(shapes),
        "matrix_bytes": _matrix_bytes(shapes),
        "dtype": "bfloat16",
        "rounds": setup.rounds,
        "runs": [_run_on(ranks, setup, arguments.timeout) for ranks in groups],
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    columns = ["ranks", "route", "ms per step", "times owner", "collectives per step"]
    columns += ["bytes sent per rank", "formula", "worst difference"]
    rows = []
    for group in result["runs"]:
        ranks = f"{group['ranks']} ({group['backend']})"
        if group["replicas"] > 1:
            ranks = f"{group['replicas']} x {group['shards']} ({group['backend']})"
        for name, route in group["routes"].items():
            ratio = route["milliseconds"] / group["routes"]["owner"]["milliseconds"]
            formula = route["formula_bytes"]
            rows.append(
                [
                    ranks,
                    name,
                    f"{route['milliseconds']:.1f}",
                    f"{ratio:.1f}",
                    ", ".join(f"{n} {kind}" for kind, n in route["collectives"].items()) or "none",
                    f"{route['sent_bytes']:,.0f}",
                    "" if formula is None else f"{formula:,.0f}",
                    f"{route['worst_difference']:.1e}",
                ]
            )
    caption = (
        f"{result['matrices']} matrices of {result['config']}, S = {result['matrix_bytes']:,} "
        f"bytes in {result['dtype']}; median of {result['rounds']} steps"
    )
    return f"{caption}\n\n{markdown_table(columns, rows)}"


def _check(groups: Sequence[int], replicas: int, rounds: int) -> None:
    problems = []
    if rounds < 1 or replicas < 1:
        problems.append(f"--rounds {rounds} --replicas {replicas}: must be at least 1")
    for ranks in groups:
        if ranks < 1 or (replicas > 0 and ranks % replicas):
            problems.append(f"--ranks {ranks}: must be a multiple of --replicas {replicas}")
    if problems:
        raise UserError(*problems)


def matrix_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the matrices of the configuration's model."""
    with torch.device("meta"):
        model = GPT(config.model)
    groups = group_parameters(model.named_parameters(), config.optim, config.model.tie_embeddings)
    (matrices,) = [group.parameters for group in groups if group.name == "matrix"]
    return {name: (p.shape[0], p.shape[1]) for name, p in matrices.items()}


def _matrix_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(rows * cols for rows, cols in shapes.values()) * _BYTES


# ---------------------------------------------------------------------------- routes


@dataclass(frozen=True)
class Route:
    """An implementation of the step."""

    sharded: Callable[[Named], torch.optim.Optimizer]
    single: Callable[[Named], torch.optim.Optimizer]
    """The same arithmetic in one process, on plain tensors."""
    formula: Callable[[float, int, int], float] | None
    """Formula of the bytes sent per rank from S, shards and replicas, if there is one."""


class AllGatherMuon(Muon):
    """Muon with which every rank gathers and orthogonalizes every matrix and keeps its rows."""

    def _make_plan(self, present: Sequence[bool]) -> Any:
        """Return a plan without waves; results for the matrices of which this rank has rows."""
        here = [key for key, parameter in enumerate(self._params) if local(parameter).numel()]
        return replace(super()._make_plan(present), whole=here, waves=[])

    def _orthogonalize(
        self, matrices: Mapping[int, Tensor], result_dtype: torch.dtype
    ) -> dict[int, Tensor]:
        results = super()._orthogonalize(self._gather(matrices), result_dtype)
        return {key: self._own_rows(result) for key, result in results.items()}

    def _gather(self, directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return all full matrices; shards are padded to one size and gathered as one tensor."""
        like = self._placement()
        shards = like.device_mesh.size(like.device_mesh.ndim - 1)
        padded = []
        for key, parameter in enumerate(self._params):
            shard = directions.get(key, local(parameter))  # the latter if it is empty
            missing = -(-parameter.shape[0] // shards) - shard.shape[0]
            padded.append(F.pad(shard, (0, 0, 0, missing)).flatten())
        sent = torch.cat(padded).to(self._dtype)
        gathered = DTensor.from_local(sent, like.device_mesh, like.placements).full_tensor()
        pieces = gathered.view(shards, -1).split([piece.numel() for piece in padded], dim=1)
        return {
            key: piece.reshape(-1, p.shape[1])[: p.shape[0]]
            for key, (p, piece) in enumerate(zip(self._params, pieces, strict=True))
        }

    def _own_rows(self, matrix: Tensor) -> Tensor:
        mesh = self._placement().device_mesh
        last = mesh.ndim - 1
        rows = rows_of_shard(matrix.shape[0], mesh.size(last), mesh.get_local_rank(last))
        return matrix[slice(*rows)]

    def _placement(self) -> DTensor:
        """Return any parameter: all are on one mesh, whose last dimension shards the rows."""
        parameter = self._params[0]
        assert isinstance(parameter, DTensor)
        return parameter


def _owner_muon(params: Named) -> torch.optim.Optimizer:
    return Muon(params, _LR, _WEIGHT_DECAY, _SETTINGS)


def _all_gather_muon(params: Named) -> torch.optim.Optimizer:
    return AllGatherMuon(params, _LR, _WEIGHT_DECAY, _SETTINGS)


def _torch_muon(params: Named) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for _, p in params], lr=_LR, weight_decay=_WEIGHT_DECAY)


def _owner_bytes(size: float, shards: int, replicas: int) -> float:
    """Return bytes: rows to the owner in their replica, results to all; 0 for one rank."""
    ranks = shards * replicas
    return size / ranks + size / shards if ranks > 1 else 0.0


def _all_gather_bytes(size: float, shards: int, replicas: int) -> float:
    """Return bytes, without the padding of uneven shards."""
    return size if shards > 1 else 0.0


ROUTES = {
    "owner": Route(_owner_muon, _owner_muon, _owner_bytes),
    "all_gather": Route(_all_gather_muon, _owner_muon, _all_gather_bytes),
    "torch": Route(_torch_muon, _torch_muon, None),
}


# ---------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Measurement:
    """One rank's measurement of one route."""

    seconds: list[float]
    collectives: dict[str, int]
    sent_bytes: int
    worst_difference: float


def _run_on(ranks: int, setup: Setup, timeout: float) -> dict[str, Any]:
    """Measure on this many processes."""
    of_ranks = on_ranks(_of_rank, ranks, setup, timeout=timeout)
    size, shards = _matrix_bytes(setup.shapes), ranks // setup.replicas
    return {
        "ranks": ranks,
        "replicas": setup.replicas,
        "shards": shards,
        "backend": "nccl" if torch.cuda.is_available() else "gloo",
        "routes": {
            name: _summary([Measurement(**of_rank[name]) for of_rank in of_ranks])
            | {"formula_bytes": route.formula and route.formula(size, shards, setup.replicas)}
            for name, route in ROUTES.items()
        },
    }


def _of_rank(device: torch.device, setup: Setup) -> dict[str, Any]:
    return {name: asdict(measured) for name, measured in measure(setup, device).items()}


def _summary(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Summarize all ranks: a step takes as long as its slowest rank."""
    steps = zip(*(m.seconds for m in measurements), strict=True)
    slowest = [1e3 * max(step) for step in steps]
    sent = [m.sent_bytes for m in measurements]
    return {
        "milliseconds": statistics.median(slowest),
        "milliseconds_of_each_step": slowest,
        "collectives": measurements[0].collectives,
        "sent_bytes": statistics.mean(sent),
        "sent_bytes_of_each_rank": sent,
        "worst_difference": max(m.worst_difference for m in measurements),
    }


def measure(setup: Setup, device: torch.device) -> dict[str, Measurement]:
    """Compare the first steps, count the second ones, time all others interleaved (A B C A B C)."""
    mesh = _mesh(setup.replicas, device)
    optimizers, differences, counters = {}, {}, {}
    for name, route in ROUTES.items():
        parameters = _parameters(setup.shapes, device, mesh)
        optimizers[name] = route.sharded(parameters)
        optimizers[name].step()
        differences[name] = _worst_difference(parameters, _single(route, setup.shapes, device))
        with CollectiveCounter() as counters[name]:
            optimizers[name].step()
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = time_interleaved(steps, setup.rounds, device)
    return {
        name: Measurement(
            seconds[name], dict(counters[name].counts), counters[name].sent, differences[name]
        )
        for name in ROUTES
    }


def _mesh(replicas: int, device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks, as in ``start_world``."""
    mesh = init_device_mesh(
        device.type,
        (replicas, dist.get_world_size() // replicas),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    return mesh if replicas > 1 else mesh["dp_shard"]


def _parameters(
    shapes: Mapping[str, tuple[int, int]], device: torch.device, mesh: DeviceMesh | None
) -> Named:
    """Return zeros, so that the first step yields the bare update; equal gradients on all ranks."""
    generator = torch.Generator().manual_seed(0)
    named: list[tuple[str, Tensor]] = []
    for name, shape in shapes.items():
        parameter = nn.Parameter(_placed(torch.zeros(shape, device=device), mesh))
        gradient = torch.randn(shape, generator=generator).to(device)
        parameter.grad = _placed(gradient, mesh)
        named.append((name, parameter))
    return named


def _placed(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Place a tensor unsharded, or by rows over the mesh's last dimension, as ``fully_shard``."""
    if mesh is None:
        return tensor
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def _single(
    route: Route, shapes: Mapping[str, tuple[int, int]], device: torch.device
) -> dict[str, Tensor]:
    """Return the updates of a single process."""
    parameters = _parameters(shapes, device, mesh=None)
    route.single(parameters).step()
    return dict(parameters)


def _worst_difference(parameters: Named, expected: Mapping[str, Tensor]) -> float:
    """Return the largest |found - expected| / |expected| of any matrix."""
    differences = []
    for name, parameter in parameters:
        assert isinstance(parameter, DTensor)
        reference = expected[name].detach()
        error = torch.linalg.norm(parameter.full_tensor().detach() - reference)
        differences.append((error / torch.linalg.norm(reference)).item())
    return max(differences)
