"""Apply parallelism to the plain model: checkpointing, compile per region, FSDP2, real weights.

The order matters: activation checkpointing changes what a region computes, so it comes before the
compiler; ``fully_shard`` comes last and sees the finished modules. The model stays on the meta
device until its parameters are shards, so that no rank ever holds all of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from jepa_dist.config import ParallelConfig
from jepa_dist.parallel.world import World

T = TypeVar("T")


class InitialValue(Protocol):
    """Full initial tensor of a parameter; the same on every rank that asks."""

    def __call__(self, name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
        """Return the float32 tensor of this full shape, on ``device``."""


# Identical blocks share a graph; this many variants (parallel, XSA, with and without gradient)
# may exist before the compiler gives up, which with fullgraph is an error.
_MOST_VARIANTS = 32


def compile_region(region: nn.Module) -> None:
    """Compile one region as one graph; identical regions share it."""
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    region.compile(fullgraph=True, dynamic=False)


def parallelize(
    model: nn.Module,
    *,
    regions: Iterable[tuple[str, nn.Module]],
    blocks: Iterable[nn.Module],
    looped: Iterable[nn.Module],
    reduced_in_parts: Iterable[nn.Module] = (),
    config: ParallelConfig,
    world: World,
    initial_value: InitialValue,
    micro_batches: int = 1,
) -> FSDPSchedule:
    """Turn a model on the meta device into this rank's part of it, with its initial weights.

    Args:
        model: The plain model; parameters on meta.
        regions: Modules to compile, named by the model.
        blocks: Modules in execution order, each of which returns one tensor; they are gathered and
            freed in units of ``config.blocks_per_unit``.
        looped: Blocks that run several times per pass.
        reduced_in_parts: Blocks with parameters that only one of these executions uses, whose
            gradients are reduced before the others'.
        config: Parallel settings.
        world: Ranks and mesh.
        initial_value: Full initial tensor by name and shape, the same on every rank.
        micro_batches: Forward and backward passes per optimizer step.

    Returns:
        The schedule of gathering parameters and reducing gradients.
    """
    blocks, looped = list(blocks), list(looped)
    for block in blocks:
        checkpoint_activations(block, config.activation_checkpointing)
    if config.compile:
        for _, region in regions:
            compile_region(region)
    units = fsdp_units(blocks, looped, config.blocks_per_unit)
    looped = looped if config.keep_looped_gathered else []
    accumulates = micro_batches > 1 and config.accumulate == "gathered"
    # The last block's backward follows its forward immediately.
    kept = blocks if accumulates else [*looped, *blocks[-1:]]
    shard(model, units, kept, config, world)
    materialize(model, world.device, initial_value)
    return FSDPSchedule(model, looped, config, reduced_in_parts)


def fsdp_units(blocks: Sequence[T], looped: Iterable[T], blocks_per_unit: int) -> list[list[T]]:
    """Divide the blocks into the units that are gathered and reduced together, besides the root's.

    A unit holds up to ``blocks_per_unit`` consecutive blocks, either looped ones or others. FSDP2
    ends the forward of a unit when each of its blocks has run once, so a pass over the model must
    run all of a unit's blocks equally often, and run them all before it repeats one. If one unit
    would hold all blocks, there are no units: the blocks belong to the root, whose forward is the
    whole pass.
    """
    if blocks_per_unit >= len(blocks):
        return []
    runs = [list(run) for _, run in itertools.groupby(blocks, key=set(looped).__contains__)]
    return [
        run[start : start + blocks_per_unit]
        for run in runs
        for start in range(0, len(run), blocks_per_unit)
    ]


def shard(
    model: nn.Module,
    units: Iterable[list[nn.Module]],
    kept: Iterable[nn.Module],
    config: ParallelConfig,
    world: World,
) -> None:
    """Apply ``fully_shard`` to each unit and the root; gradients are summed, not averaged.

    Units with a block in ``kept`` stay gathered between forward and backward, whatever the
    configuration; so does the root.
    """
    kept = set(kept)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config, world.device),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for unit in units:
        reshard = config.reshard_after_forward and kept.isdisjoint(unit)
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    if world.world_size == 1:
        return  # no reduction; a divide factor would cost a pass over all gradients
    for module in fsdp_modules(model):
        # Losses are divided by the global batch before backward: the plain sum is then exact for
        # ranks that hold different numbers of sequences. gloo has no pre-multiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


class FSDPSchedule:
    """FSDP schedule of one optimizer step: when to gather parameters and reduce gradients.

    Between micro-batches parameters stay gathered and gradients unsharded, so that a step gathers
    and reduces once (``parallel.accumulate: sharded`` frees and reduces after each). Looped blocks
    stay gathered from their first pass until the last backward is done (measured: 12 instead of 33
    all-gathers for four of eight blocks run three times). Autograd adds up the gradients of their
    passes before FSDP2 sees them, so they are reduced once; only MLPs that belong to a single pass
    (``model.untie_loop_mlps``) are reduced as soon as that pass is done.

    With replicas and ``accumulate: sharded``, gradients are summed over the replicas only in the
    last micro-batch, except those of ``reduced_in_parts``: FSDP2 keeps one partial sum per block,
    which has the shape of the latest reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        looped: Iterable[nn.Module],
        config: ParallelConfig,
        reduced_in_parts: Iterable[nn.Module] = (),
    ) -> None:
        assert isinstance(model, FSDPModule)
        self._model = model
        self._looped = [block for block in looped if isinstance(block, FSDPModule)]
        self._in_parts = [block for block in reduced_in_parts if isinstance(block, FSDPModule)]
        self._shards_each = config.accumulate == "sharded"

    def micro_batches(self, count: int) -> Iterator[int]:
        """Yield the index of each micro-batch of a step, for its forward and backward.

        Afterwards parameters are sharded again.
        """
        for index in range(count):
            self._begin_micro_batch(is_last=index == count - 1)
            yield index
        self.release()

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        """Set up forward and backward of one micro-batch."""
        is_complete = is_last or self._shards_each
        self._model.set_requires_gradient_sync(is_complete)
        self._model.set_requires_all_reduce(is_last)  # over replicas: once per step in any case
        for block in self._in_parts:
            block.set_requires_all_reduce(True)
        self._model.set_reshard_after_backward(is_complete)
        for block in self._looped:
            block.set_reshard_after_backward(False)

    def release(self) -> None:
        """Reshard all parameters. Call this after backward or evaluation.

        (A forward without backward leaves units gathered that are not resharded after forward.)
        """
        for module in fsdp_modules(self._model):
            module.reshard()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the first module of every FSDP unit, which represents it; the root first."""
    units: dict[int, FSDPModule] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            units.setdefault(id(module._get_fsdp_state()), module)
    return list(units.values())


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of gathered parameters and activations."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


# ------------------------------------------------------------------ activation checkpointing


def checkpoint_activations(block: nn.Module, mode: str) -> None:
    """Recompute the block's activations in backward, except attention (full), or except attention
    and matrix products (selective).

    The output of attention is always saved: it costs one [B, T, D] tensor per block, attention is
    the most expensive operation per byte of output, and the graph needs no state of CUDA's random
    generator, which fused kernels would otherwise have to replay.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    options["context_fn"] = functools.partial(
        create_selective_checkpoint_contexts, functools.partial(_policy, saved_operations(mode))
    )
    forward = block.forward

    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    block.forward = checkpointed


def saved_operations(mode: str) -> frozenset[Any]:
    """Return the operations whose outputs ``selective`` or ``full`` keeps for backward.

    The same object for all blocks, since graphs are keyed by its identity.
    """
    return _SAVED[mode]


_MATRIX_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
# Fused kernels only: the unfused one (math) would save its [T, T] probabilities.
_ATTENTION = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)
_SAVED = {"full": _ATTENTION, "selective": _ATTENTION | _MATRIX_PRODUCTS}


def _policy(
    saved: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


# ------------------------------------------------------------------ real weights


def materialize(model: nn.Module, device: torch.device, initial_value: InitialValue) -> None:
    """Give every parameter shard storage and its slice of the initial value; keep the buffers.

    One full parameter exists at a time, and only on ranks that hold a part of it.
    """
    if any(buffer.is_meta for buffer in model.buffers()):
        raise ValueError("buffers must be built on a real device (they are tiny and hold values)")
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            if local.numel() > 0:
                value = initial_value(name, parameter.shape, device=device)
                local.copy_(value[local_slices(parameter)])


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Return the slices of the full tensor that this rank holds (all of it if plain)."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
