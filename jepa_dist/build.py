"""Build the parts of a run from its configuration, each distributed over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jepa_dist.config import Config, ModelConfig, ParallelConfig
from jepa_dist.data.boundaries import DocumentStarts
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import TokenDataset, TrainLoader
from jepa_dist.data.sources import find_sources, mixed_names, stages_of
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.validation import Validation
from jepa_dist.model.execution import looped_blocks
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from jepa_dist.model.layers import Attention, causal_attention
from jepa_dist.objectives.joint import JointModel
from jepa_dist.objectives.objective import PREFIX
from jepa_dist.objectives.registry import objective_class
from jepa_dist.optim.ema import EMA, NoEMA
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.muon import MuonSettings
from jepa_dist.optim.optimizer import Optimizer
from jepa_dist.parallel.attention import bind_attention, choose_attention
from jepa_dist.parallel.shard import (
    FSDPSchedule,
    InitialValue,
    compute_dtype,
    parallelize,
)
from jepa_dist.parallel.world import World


def build_joint_model(
    config: Config,
    world: World,
    bos_id: int | None = None,
    values: InitialValue | None = None,
) -> tuple[JointModel, FSDPSchedule]:
    """Build the sharded, compiled model and objective with their initial weights.

    Args:
        config: The run.
        world: Ranks and mesh.
        bos_id: Id that begins every document; None if it is not known.
        values: Weights of the model to start from; None: random ones.
    """
    with torch.device("meta"):
        model = JointModel(GPT(config.model, bos_id), objective_class(config)(config, bos_id))

    def value(name: str, shape: torch.Size, *, device: torch.device) -> Tensor:
        part, _, own_name = name.partition(".")
        if part == PREFIX:
            return model.objective.initial_value(own_name, shape, seed=config.seed, device=device)
        if values is not None:
            return values(own_name, shape, device=device)
        return initial_value(own_name, shape, config=config.model, seed=config.seed, device=device)

    model.model.head.by_row = bool(mixed_names(config))
    layout = BatchLayout(config.batch.sequences, config.batch.micro, world.rank, world.world_size)
    schedule = _parallelize(model, config.parallel, world, value, layout.num_micro)
    return model, schedule


def build_optimizer(config: Config, named_parameters: Mapping[str, Tensor]) -> Optimizer:
    """Build the optimizer of this rank's shards, with the parameter groups of the recipe."""
    groups = group_parameters(named_parameters.items(), config.optim, config.model.tie_embeddings)
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    muon = MuonSettings(
        nesterov=config.optim.muon_nesterov,
        row_normalize=config.optim.muon_row_normalize,
        steps=config.optim.muon_backend_steps,
        polar_express=config.optim.muon_coefficients == "polar_express",
        dtype=dtypes[config.optim.muon_dtype],
    )
    return Optimizer(groups, muon)


def build_ema(config: Config, named_parameters: Mapping[str, Tensor]) -> EMA:
    """Build the moving average of the parameters; a null object if ``optim.ema_decay`` is 0."""
    if config.optim.ema_decay == 0:
        return NoEMA()
    return EMA(named_parameters.items(), config.optim.ema_decay)


def build_loader(
    config: Config, world: World, samples_consumed: int, skip: range = range(0)
) -> TrainLoader:
    """Build the loader of this rank's training batches.

    It starts after ``samples_consumed`` sequences and omits the samples of ``skip``.
    """
    return TrainLoader(
        _training_samples(config),
        BatchLayout(config.batch.sequences, config.batch.micro, world.rank, world.world_size),
        seed=config.seed,
        samples_consumed=samples_consumed,
        skip=skip,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=world.device.type == "cuda",
    )


def _training_samples(config: Config) -> TokenDataset:
    sources = find_sources(config, "train")
    return TokenDataset(
        [path for source in sources for path in source.paths],
        config.model.seq_len,
        config.model.vocab_size,
        shards=[len(source.paths) for source in sources],
        stages=stages_of(config),
    )


def build_document_starts(
    config: Config, world: World, bos_id: int | None, *, step: int, consumed: int, skip: range
) -> DocumentStarts | None:
    """Build the reader of document starts in the batches from ``step`` on.

    None on ranks other than 0, which draws the samples, and if they do not depend on documents.
    """
    if not objective_class(config).reads_documents(config) or bos_id is None or not world.is_main:
        return None
    return DocumentStarts(
        _training_samples(config),
        bos_id,
        sequences=config.batch.sequences,
        seed=config.seed,
        step=step,
        samples_consumed=consumed,
        skip=skip,
    )


def build_validation(
    config: Config, world: World, micro: int, tokenizer: Tokenizer | None
) -> Validation:
    """Build the fixed validation set."""
    streams = {
        source.name: TokenStream(source.paths, config.model.vocab_size)
        for source in find_sources(config, "val")
    }
    counter = None if tokenizer is None else tokenizer.byte_counter()
    return Validation(streams, config.model.seq_len, config.eval.sequences, micro, counter, world)


def build_gpt(
    config: ModelConfig,
    parallel: ParallelConfig,
    world: World,
    initial_value: InitialValue,
    micro_batches: int = 1,
    bos_id: int | None = None,
) -> tuple[GPT, FSDPSchedule]:
    """Build the sharded, compiled model with its initial weights, without an objective.

    Args:
        config: The model.
        parallel: Compilation, precision, sharding.
        world: Ranks and mesh.
        initial_value: Full initial tensor by name and shape, the same on every rank.
        micro_batches: Forward and backward passes per optimizer step.
        bos_id: Id that begins every document; read only with ``model.document_mask``.
    """
    with torch.device("meta"):
        model = GPT(config, bos_id)
    return model, _parallelize(model, parallel, world, initial_value, micro_batches)


def _parallelize(
    root: GPT | JointModel,
    parallel: ParallelConfig,
    world: World,
    initial_value: InitialValue,
    micro_batches: int,
) -> FSDPSchedule:
    """Shard and compile a model on the meta device; see ``build_gpt``."""
    model = root if isinstance(root, GPT) else root.model
    config = model.config
    looped = [model.blocks[index] for index in looped_blocks(config)]
    _bind_attention(model, config, parallel, world.device)
    return parallelize(
        root,
        regions=root.regions(),
        blocks=model.blocks,
        looped=looped,
        reduced_in_parts=looped if config.untie_loop_mlps else [],
        config=parallel,
        world=world,
        initial_value=initial_value,
        micro_batches=micro_batches,
    )


def chosen_attention(config: ModelConfig, parallel: ParallelConfig, device: torch.device) -> str:
    """Return the name of the attention kernel that the model will run on ``device``.

    Raises:
        UserError: ``parallel.attention`` cannot run there.
    """
    width, length = config.head_dim, config.seq_len
    query = torch.Size([1, config.num_heads, length, width])
    key = torch.Size([1, config.num_kv_heads, length, width])
    dtype = compute_dtype(parallel, device)
    return choose_attention(
        parallel.attention,
        query,
        key,
        dtype,
        device,
        masks_documents=config.document_mask,
        is_compiled=parallel.compile,
    )


def _bind_attention(
    model: GPT, config: ModelConfig, parallel: ParallelConfig, device: torch.device
) -> None:
    """Have every block compute attention with the chosen kernel, by one function for all blocks
    (they share compiled graphs)."""
    name = chosen_attention(config, parallel, device)
    attend = bind_attention(causal_attention, name, others=parallel.attention == "auto")
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
