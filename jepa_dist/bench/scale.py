"""Weak and strong scaling on real ranks of this machine, and simulation of larger clusters.

*Real*: steps of the trainer on 1, 2, 4 processes, with a fixed global batch (strong) and with one
proportional to the ranks (weak). Processes on one machine share its cores and its memory: the
efficiency shows the cost of communication and waiting here, not on a cluster.

*Simulated*: this process is rank 0 of W in a ``fake`` process group and shards the model with
``jepa_dist.parallel``, on tensors without data. It runs a step of forward, backward, clipping and
optimizer; collectives, bytes and this rank's memory are counted, nothing is computed. (The plan's
broadcast and the metrics' reduction belong to the trainer and are not counted.) Bytes are
counted as in ``jepa_dist.bench.collectives``; the compute dtype is bfloat16, as on CUDA.

The memory of a rank is estimated as: parameter, gradient and optimizer shards and the average
(counted), plus gathered parameters (2P while they stay gathered, otherwise root, looped blocks and
the two largest others), plus full gradients between micro-batches (4P), or those of the root and
one block (4 bytes each), plus activations. Without checkpointing these are the tensors that
autograd saves in every execution of a block and of the head (counted eagerly: the compiler saves
less). With it, they are the input of every execution (2 x tokens x width bytes), the outputs that
the mode saves (counted), and what autograd saves in one block or in the head.
Newton-Schulz runs when activations are freed and needs less. CUDA's context, NCCL's buffers and
fragmentation add some GB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jepa_dist.bench.collectives import CollectiveCounter
from jepa_dist.bench.comm import shapes_of
from jepa_dist.bench.common import (
    add_config,
    chosen_config,
    markdown_table,
    on_ranks,
    refuse_launcher,
    time_interleaved,
    with_random_data,
)
from jepa_dist.build import build_ema, build_gpt, build_optimizer
from jepa_dist.config import Config, load
from jepa_dist.data.layout import BatchLayout
from jepa_dist.model.execution import LAST_PHASE, execution_order, looped_blocks
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import Block
from jepa_dist.optim.clip import clip_grad_norm
from jepa_dist.optim.muon import Muon
from jepa_dist.parallel.shard import saved_operations
from jepa_dist.parallel.world import World, build_mesh, start_world
from jepa_dist.training.assemble import build_trainer

_ELEMENT = 2  # bytes per element of the compute dtype
_CONFIGS = ("configs/gpt_36m.yaml", "configs/gpt_1b.yaml", "configs/gpt_7b.yaml")

# ---------------------------------------------------------------------------- real ranks


def throughput(config: Config, ranks: int, rounds: int, timeout: float) -> float:
    """Return the tokens per second of this many processes: median step, slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = with_random_data(config, Path(folder), (rounds + 3) * config.batch.sequences)
        of_ranks = on_ranks(_time_steps, ranks, prepared, rounds, timeout=timeout)
    seconds = median(max(step) for step in zip(*of_ranks, strict=True))
    return config.batch.sequences * config.model.seq_len / seconds


def _time_steps(device: torch.device, config: Config, rounds: int) -> list[float]:
    """Return the seconds of each step after two warm-up steps."""
    trainer = build_trainer(config, start_world(config.parallel))
    segment, steps = trainer.segment, iter(range(config.train.steps))

    def step() -> None:
        segment.plans.request(next(steps))
        trainer.step(segment.plans.take())
        segment.reduction.drain()

    step()
    step()
    return time_interleaved({"step": step}, rounds, device)["step"]


def _scaling(config: Config, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure strong and weak scaling over the numbers of ranks."""
    rows = []
    for ranks in arguments.ranks:
        grown = config.batch.model_copy(update={"sequences": config.batch.sequences * ranks})
        strong = throughput(config, ranks, arguments.rounds, arguments.timeout)
        weak = strong  # of one rank: the same batch
        if ranks > 1:
            larger = config.model_copy(update={"batch": grown})
            weak = throughput(larger, ranks, arguments.rounds, arguments.timeout)
        rows.append({"ranks": ranks, "strong": strong, "weak": weak})
    return rows


# ---------------------------------------------------------------------------- simulated ranks


def simulate(config: Config, ranks: int) -> dict[str, Any]:
    """Return the traffic of rank 0 of ``ranks`` in a step, and its memory.

    The batch has at least one sequence per rank; more than two micro-batches are simulated as two.
    """
    config = simulated_config(config, ranks)
    layout = BatchLayout(config.batch.sequences, config.batch.micro, 0, ranks)
    micro_batches = min(2, layout.num_micro)
    start = time.monotonic()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        counter, held = _simulate_step(config, ranks, micro_batches, layout.micro_size)
    finally:
        dist.destroy_process_group()
    memory = held | _working_memory(config, micro_batches, layout.micro_size)
    return {
        "ranks": ranks,
        "micro_batches": layout.num_micro,
        "micro_size": layout.micro_size,
        "launches": dict(counter.counts),
        "bytes": dict(counter.bytes),
        "memory": memory,
        "memory_total": sum(memory.values()),
        "simulated_seconds": time.monotonic() - start,
    }


def simulated_config(config: Config, ranks: int) -> Config:
    """Return the simulated configuration: eager, bfloat16, at least one sequence per rank."""
    sequences = max(config.batch.sequences, ranks)
    parallel = {"compile": False, "precision": "bfloat16", "attention": "auto"}
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"sequences": sequences}),
            "parallel": config.parallel.model_copy(update=parallel),
            "optim": config.optim.model_copy(update={"muon_dtype": "bfloat16"}),
        }
    )


def _simulate_step(
    config: Config, ranks: int, micro_batches: int, rows: int
) -> tuple[CollectiveCounter, dict[str, int]]:
    """Run one step in the last recurrence phase."""
    meta, timeout = torch.device("meta"), timedelta(seconds=60)
    mesh = build_mesh(config.parallel, ranks, torch.device("cpu"))
    world = World(0, 0, ranks, meta, mesh, dist.new_group(), timeout)
    model, schedule = build_gpt(
        config.model, config.parallel, world, _nothing, micro_batches, bos_id=0
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
        tokens = torch.zeros(rows, config.model.seq_len, dtype=torch.int64)
        weight = torch.ones(rows)
    optimizer = build_optimizer(config, dict(model.named_parameters()))
    ema = build_ema(config, dict(model.named_parameters()))

    # Simulated ranks cannot compare their sets of gradients.
    with (
        mode,
        patch.object(Muon, "_require_equal_on_all_ranks", lambda muon, present: None),
        CollectiveCounter() as counter,
    ):
        for _ in schedule.micro_batches(micro_batches):
            output = model(tokens, tokens, weight, phase=LAST_PHASE)
            assert output.loss_sum is not None
            output.loss_sum.backward()
        clip_grad_norm(model.parameters(), config.optim.grad_clip_norm)
        optimizer.step()
    held = {
        "parameters": _bytes(model.parameters()),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": _bytes(optimizer.state_tensors().values()),
        "average": _bytes(ema.state_tensors().values()),
    }
    return counter, held


def _nothing(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
    return torch.empty(shape, device=device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this rank's shards."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def _working_memory(config: Config, micro_batches: int, rows: int) -> dict[str, int]:
    """Return the temporary memory of a step; see the module's docstring."""
    shapes, parallel = shapes_of(config), config.parallel
    accumulates = micro_batches > 1 and parallel.accumulate == "gathered"
    looped = looped_blocks(config.model) if parallel.keep_looped_gathered else range(0)
    kept = [size for last, size in shapes.units.items() if last in looped]
    others = sorted(size for last, size in shapes.units.items() if last not in looped)
    some = shapes.root + sum(kept) + sum(others[-2:])
    is_whole = accumulates or not parallel.reshard_after_forward
    gathered = shapes.all if is_whole else some
    largest = max(shapes.units.values(), default=0)
    gradients = shapes.all if accumulates else shapes.root + largest
    return {
        "gathered parameters": _ELEMENT * gathered,
        "whole gradients": 4 * gradients,
        "activations": _activations(config, rows),
    }


def _activations(config: Config, rows: int) -> int:
    """Return the bytes of activations; see the module's docstring."""
    order = execution_order(config.model, LAST_PHASE)
    executions = len(order.encoder) + len(order.decoder)
    mode = config.parallel.activation_checkpointing
    with FakeTensorMode():
        model = GPT(config.model, bos_id=0).to(torch.bfloat16)
        shape = (rows, config.model.seq_len)
        x_BTD = torch.zeros(*shape, config.model.model_dim, dtype=torch.bfloat16).requires_grad_()
        tokens_BT = torch.zeros(shape, dtype=torch.int64)
        one_block = _saved_bytes(lambda: _run_one_block(model, x_BTD))
        proj = None if model.head_proj is None else model.head_proj.weight
        head_VE = (model.tok_emb if model.lm_head is None else model.lm_head).weight
        head = _saved_bytes(lambda: model.head(x_BTD, head_VE, proj, tokens_BT, torch.ones(rows)))
        if mode == "none":
            return executions * one_block + head
        with _OutputBytes(saved_operations(mode)) as saved:
            _run_one_block(model, x_BTD)
    return executions * (x_BTD.nbytes + saved.bytes) + max(one_block, head)


class _OutputBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes returned by some operations."""

    def __init__(self, operations: frozenset[Any]) -> None:
        super().__init__()
        self.bytes = 0
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func in self._operations:
            self.bytes += sum(t.nbytes for t in tree_leaves(outputs) if isinstance(t, Tensor))
        return outputs


def _run_one_block(model: GPT, x_BTD: Tensor) -> None:
    block = model.blocks[0]
    assert isinstance(block, Block)
    places = model.places(torch.zeros(x_BTD.shape[:2], dtype=torch.int64))
    x0_BTD = x_BTD.clone() if model.config.x0_mix else None
    mlp = block.mlp_of_repeat(0)
    block(x_BTD, x0_BTD, places.cos, places.sin, mlp, places.documents_BT)


def _saved_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes that autograd saves for backward, each storage once, no parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values())


# ---------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench scale``."""
    add_config(parser)
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 2, 4], help="real ranks; none: only simulate"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--simulate", nargs="*", default=_CONFIGS, metavar="FILE", help="configurations"
    )
    parser.add_argument(
        "--simulated-ranks", type=int, nargs="+", default=[8, 64, 256, 1024], metavar="W"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="time limit in seconds for a group of ranks"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the real ranks, count the simulated ones.

    Raises:
        UserError: an invalid configuration, or ranks take too long.
    """
    refuse_launcher("scale")
    config = chosen_config(arguments)
    return {
        "config": str(arguments.config),
        "changes": arguments.set,
        "rounds": arguments.rounds,
        "sequences": config.batch.sequences,
        "real": _scaling(config, arguments),
        "simulated": {
            path: _simulated(load(path, arguments.set).config, arguments.simulated_ranks)
            for path in arguments.simulate
        },
    }


def _simulated(config: Config, all_ranks: Iterable[int]) -> dict[str, Any]:
    return {
        "parameters": shapes_of(config).all,
        "runs": [simulate(config, ranks) for ranks in all_ranks],
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown: real scaling, then simulated traffic and memory."""
    parts = [f"all with {' '.join(result['changes'])}"] if result["changes"] else []
    if result["real"]:
        caption = f"{result['config']}, {result['sequences']} sequences (weak: per rank); "
        parts += [caption + f"median of {result['rounds']} steps", _real_table(result["real"])]
    if result["simulated"]:
        parts += [_sent_table(result["simulated"]), _memory_table(result["simulated"])]
    return "\n\n".join(parts)


def _real_table(rows: list[dict[str, Any]]) -> str:
    columns = ["ranks", "strong, tokens/s", "times first", "weak, tokens/s", "times first"]
    first = rows[0]
    cells = [
        [row["ranks"]]
        + [f"{row[k] / by:,.{n}f}" for k in ("strong", "weak") for by, n in ((1, 0), (first[k], 2))]
        for row in rows
    ]
    return markdown_table(columns, cells)


def _sent_table(simulated: Mapping[str, Any]) -> str:
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")
    columns = ["configuration", "parameters", "W", "micro-batches"]
    columns += [f"{kind}: launches, GB" for kind in kinds]
    rows = [
        [Path(path).stem, f"{model['parameters']:,}", run["ranks"], run["micro_batches"]]
        + [f"{run['launches'].get(k, 0)}, {run['bytes'].get(k, 0) / 1e9:.3f}" for k in kinds]
        for path, model in simulated.items()
        for run in model["runs"]
    ]
    return markdown_table(columns, rows)


def _memory_table(simulated: Mapping[str, Any]) -> str:
    parts = list(next(iter(simulated.values()))["runs"][0]["memory"])
    columns = ["configuration", "W", "rows of a micro-batch"]
    columns += [f"{part}, GB" for part in parts] + ["together, GB"]
    rows = [
        [Path(path).stem, run["ranks"], run["micro_size"]]
        + [f"{run['memory'][part] / 1e9:.2f}" for part in parts]
        + [f"{run['memory_total'] / 1e9:.1f}"]
        for path, model in simulated.items()
        for run in model["runs"]
    ]
    return markdown_table(columns, rows)
