"""A step of Muon on sharded matrices by three routes, on real ranks of this machine.

``owner`` is ours: each matrix goes to one rank and comes back (``jepa_dist.optim.muon``).
``all_gather`` brings every matrix to every rank, and every rank orthogonalises all of them.
``torch`` is ``torch.optim.Muon`` on DTensors. All three iterate in bfloat16 and leave out what
``torch.optim.Muon`` does not have (row normalisation).

Bytes are what a rank sends per step, its own part included: the input of an all-to-all, the output
of an all-gather, twice the tensor of an all-reduce. Without replicas (ranks - 1) / ranks of that
crosses to others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_dist.config import load
from jepa_dist.errors import UserError
from jepa_dist.launched import is_launched
from jepa_dist.model.gpt import GPT
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.muon import Muon, MuonSettings
from jepa_dist.optim.shards import local, rows_of_shard

_SETTINGS = MuonSettings(row_normalize=False, dtype=torch.bfloat16)
_BYTES = torch.bfloat16.itemsize
_LR, _WEIGHT_DECAY = 0.02, 0.1

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Setup:
    """What is measured; the same on every rank."""

    shapes: Mapping[str, tuple[int, int]]
    replicas: int
    rounds: int
    timeout: float


# ---------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m jepa_dist.bench muon``."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("configs/debug.yaml"),
        help="take the matrices of this model (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default: 2 4; with CUDA one per device"
    )
    parser.add_argument("--replicas", type=int, default=1, help="of the sharded matrices (HSDP)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each route")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds until a group of ranks is ended"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all routes at each number of ranks.

    Raises:
        UserError: ranks that this machine or the replicas do not allow, or that take too long.
    """
    devices = torch.cuda.device_count()
    groups = arguments.ranks or ([devices] if devices else [2, 4])
    _check(groups, arguments.replicas, arguments.rounds, devices)
    shapes = _matrices(arguments.config)
    setup = Setup(shapes, arguments.replicas, arguments.rounds, arguments.timeout)
    return {
        "config": str(arguments.config),
        "matrices": len(shapes),
        "matrix_bytes": _matrix_bytes(shapes),
        "dtype": "bfloat16",
        "rounds": setup.rounds,
        "runs": [_launch(ranks, setup) for ranks in groups],
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['matrices']} matrices of {result['config']}, S = {result['matrix_bytes']:,} "
        f"bytes in {result['dtype']}; median of {result['rounds']} steps",
        "",
        "| ranks | route | ms per step | times owner | collectives per step "
        "| bytes sent per rank | formula | worst difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in result["runs"]:
        ranks = f"{group['ranks']} ({group['backend']})"
        if group["replicas"] > 1:
            ranks = f"{group['replicas']} x {group['shards']} ({group['backend']})"
        for name, route in group["routes"].items():
            ratio = route["milliseconds"] / group["routes"]["owner"]["milliseconds"]
            counts = ", ".join(f"{n} {kind}" for kind, n in route["collectives"].items()) or "none"
            formula = route["formula_bytes"]
            lines.append(
                f"| {ranks} | {name} | {route['milliseconds']:.1f} | {ratio:.1f} | {counts} "
                f"| {route['sent_bytes']:,.0f} | {'' if formula is None else f'{formula:,.0f}'} "
                f"| {route['worst_difference']:.1e} |"
            )
    return "\n".join(lines)


def _check(groups: Sequence[int], replicas: int, rounds: int, devices: int) -> None:
    problems = []
    if is_launched():
        problems.append("bench muon: starts its ranks itself; run it without torchrun")
    if rounds < 1 or replicas < 1:
        problems.append(f"--rounds {rounds} --replicas {replicas}: must be at least 1")
    for ranks in groups:
        if ranks < 1 or (replicas > 0 and ranks % replicas):
            problems.append(f"--ranks {ranks}: must be a multiple of --replicas {replicas}")
        if devices and ranks > devices:
            problems.append(f"--ranks {ranks}: this machine has {devices} CUDA device(s)")
    if problems:
        raise UserError(*problems)


def _matrices(config: Path) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that the configuration's model has."""
    resolved = load(config).config
    with torch.device("meta"):
        model = GPT(resolved.model)
    groups = group_parameters(
        model.named_parameters(), resolved.optim, resolved.model.tie_embeddings
    )
    (matrices,) = [group.parameters for group in groups if group.name == "matrix"]
    return {name: (p.shape[0], p.shape[1]) for name, p in matrices.items()}


def _matrix_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(rows * cols for rows, cols in shapes.values()) * _BYTES


# ---------------------------------------------------------------------------- routes


@dataclass(frozen=True)
class Route:
    """A way to do the step."""

    sharded: Callable[[Named], torch.optim.Optimizer]
    single: Callable[[Named], torch.optim.Optimizer]
    """The same arithmetic in one process, on plain tensors."""
    formula: Callable[[float, int, int], float] | None
    """Bytes sent per rank from S, shards and replicas, where there is a formula."""


class EveryoneMuon(Muon):
    """Every rank gathers every matrix, orthogonalises all of them and keeps its own rows."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices in place; one all-gather in all."""
        self._decay()
        results = self._orthogonalise(self._gather(self._directions()))
        self._apply({key: self._own_rows(result) for key, result in results.items()})

    def _gather(self, directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """All matrices, whole; shards are padded to one size and travel as one tensor."""
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
        """Any parameter: all lie on one mesh, whose last dimension splits the rows."""
        parameter = self._params[0]
        assert isinstance(parameter, DTensor)
        return parameter


def _ours(params: Named) -> torch.optim.Optimizer:
    return Muon(params, _LR, _WEIGHT_DECAY, _SETTINGS)


def _everyones(params: Named) -> torch.optim.Optimizer:
    return EveryoneMuon(params, _LR, _WEIGHT_DECAY, _SETTINGS)


def _torchs(params: Named) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for _, p in params], lr=_LR, weight_decay=_WEIGHT_DECAY)


def _owner_bytes(size: float, shards: int, replicas: int) -> float:
    """Rows go to the owner in their replica, results to every replica; one rank sends nothing."""
    ranks = shards * replicas
    return size / ranks + size / shards if ranks > 1 else 0.0


def _all_gather_bytes(size: float, shards: int, replicas: int) -> float:
    """Up to what padding of uneven shards adds."""
    return size if shards > 1 else 0.0


ROUTES = {
    "owner": Route(_ours, _ours, _owner_bytes),
    "all_gather": Route(_everyones, _ours, _all_gather_bytes),
    "torch": Route(_torchs, _torchs, None),
}


# ---------------------------------------------------------------------------- ranks


def _launch(ranks: int, setup: Setup) -> dict[str, Any]:
    """Measure on so many processes, which all end before this returns or raises."""
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + setup.timeout
        context = spawn(_rank, (ranks, setup, folder), nprocs=ranks, join=False, daemon=True)
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"bench muon: {ranks} ranks did not finish in {setup.timeout:g} s; "
                        "give more --timeout, fewer --rounds or a smaller --config"
                    )
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def _rank(rank: int, ranks: int, setup: Setup, folder: str) -> None:
    """One rank's part; rank 0 leaves the result in ``folder``."""
    # What torch.multiprocessing has the kernel send when the parent dies: then end at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=setup.timeout),
        device_id=device if is_cuda else None,
    )
    mine = measure(setup, device)
    everyones: list[Any] = [None] * ranks
    dist.all_gather_object(everyones, mine)
    if rank == 0:
        size, shards = _matrix_bytes(setup.shapes), ranks // setup.replicas
        result = {
            "ranks": ranks,
            "replicas": setup.replicas,
            "shards": shards,
            "backend": "nccl" if is_cuda else "gloo",
            "routes": {
                name: _summary([of_rank[name] for of_rank in everyones])
                | {"formula_bytes": route.formula and route.formula(size, shards, setup.replicas)}
                for name, route in ROUTES.items()
            },
        }
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


@dataclass(frozen=True)
class Measurement:
    """What one rank saw of one route."""

    seconds: list[float]
    collectives: dict[str, int]
    sent_bytes: int
    worst_difference: float


def _summary(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """All ranks together: a step takes as long as its slowest rank."""
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
    """First steps compared, second ones counted, all others timed in turn: A B C A B C."""
    mesh = _mesh(setup.replicas, device)
    optimizers, differences, counters = {}, {}, {}
    for name, route in ROUTES.items():
        parameters = _parameters(setup.shapes, device, mesh)
        optimizers[name] = route.sharded(parameters)
        optimizers[name].step()
        differences[name] = _worst_difference(parameters, _single(route, setup.shapes, device))
        with CollectiveCounter() as counters[name]:
            optimizers[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in ROUTES}
    for _ in range(setup.rounds):
        for name, optimizer in optimizers.items():
            seconds[name].append(_timed(optimizer, device))
    return {
        name: Measurement(
            seconds[name], dict(counters[name].counts), counters[name].sent, differences[name]
        )
        for name in ROUTES
    }


def _mesh(replicas: int, device: torch.device) -> DeviceMesh:
    """All ranks, as ``start_world`` arranges them."""
    mesh = init_device_mesh(
        device.type,
        (replicas, dist.get_world_size() // replicas),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    return mesh if replicas > 1 else mesh["dp_shard"]


def _parameters(
    shapes: Mapping[str, tuple[int, int]], device: torch.device, mesh: DeviceMesh | None
) -> Named:
    """Zeros, so that the first step leaves the bare update, with the same gradients everywhere."""
    generator = torch.Generator().manual_seed(0)
    named: list[tuple[str, Tensor]] = []
    for name, shape in shapes.items():
        parameter = nn.Parameter(_placed(torch.zeros(shape, device=device), mesh))
        gradient = torch.randn(shape, generator=generator).to(device)
        parameter.grad = _placed(gradient, mesh)
        named.append((name, parameter))
    return named


def _placed(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Whole, or by rows over the last dimension of the mesh, as ``fully_shard`` places them."""
    if mesh is None:
        return tensor
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def _single(
    route: Route, shapes: Mapping[str, tuple[int, int]], device: torch.device
) -> dict[str, Tensor]:
    """The updates that one process makes."""
    parameters = _parameters(shapes, device, mesh=None)
    route.single(parameters).step()
    return dict(parameters)


def _worst_difference(parameters: Named, expected: Mapping[str, Tensor]) -> float:
    """The largest |found - expected| / |expected| of any matrix."""
    differences = []
    for name, parameter in parameters:
        assert isinstance(parameter, DTensor)
        reference = expected[name].detach()
        error = torch.linalg.norm(parameter.full_tensor().detach() - reference)
        differences.append((error / torch.linalg.norm(reference)).item())
    return max(differences)


def _timed(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Seconds of one step that all ranks begin together."""
    _finish(device)
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------- counting

# Kind and bytes sent per collective; see the module's docstring.
_COLLECTIVES: dict[str, tuple[str, Callable[[Any], int]]] = {
    "c10d::alltoall_base_": ("all_to_all", lambda args: args[1].nbytes),
    "c10d::allreduce_": ("all_reduce", lambda args: 2 * sum(t.nbytes for t in args[0])),
    "_c10d_functional::all_gather_into_tensor": (
        "all_gather",
        lambda args: args[0].nbytes * args[1],
    ),
    "_c10d_functional::all_reduce": ("all_reduce", lambda args: 2 * args[0].nbytes),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", lambda args: args[0].nbytes),
}
_NOT_COLLECTIVES = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are called within, by kind, and the bytes sent."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let DTensors take themselves apart, then look at what is left."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and func.name() not in _NOT_COLLECTIVES:
            if func.name() not in _COLLECTIVES:
                raise RuntimeError(f"{func.name()}: this benchmark cannot count it")
            kind, sent_bytes = _COLLECTIVES[func.name()]
            self.counts[kind] += 1
            self.sent += sent_bytes(args)
        return func(*args, **(kwargs or {}))
