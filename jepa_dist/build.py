"""A GPT laid out over the ranks: where the model and its parallelism meet."""

from __future__ import annotations

import torch

from jepa_dist.config import ModelConfig, ParallelConfig
from jepa_dist.model.execution import looped_blocks
from jepa_dist.model.gpt import GPT
from jepa_dist.parallel.shard import Gathering, InitialValue, parallelise
from jepa_dist.parallel.world import World


def build_gpt(
    config: ModelConfig, parallel: ParallelConfig, world: World, initial_value: InitialValue
) -> tuple[GPT, Gathering]:
    """The sharded, compiled model with its first values.

    Args:
        config: The model.
        parallel: Compilation, precision, sharding.
        world: Ranks and mesh.
        initial_value: Full initial tensor by name and shape, the same on every rank.
    """
    with torch.device("meta"):
        model = GPT(config)
    gathering = parallelise(
        model,
        regions=model.regions(),
        blocks=model.blocks,
        looped=[model.blocks[index] for index in looped_blocks(config)],
        config=parallel,
        world=world,
        initial_value=initial_value,
    )
    return model, gathering
