"""What the objective is computed from: the span samplers, and the states of a first step."""

from __future__ import annotations

import torch

from jepa_dist.config import Config
from jepa_dist.data.loader import TokenDataset
from jepa_dist.data.order import sample_order
from jepa_dist.data.shards import find_shards
from jepa_dist.model.gpt import GPT, Output
from jepa_dist.model.init import initial_value

SAMPLERS = ["start_then_length", "uniform"]


def first_forward(config: Config) -> Output:
    """Run a plain model on the first global batch."""
    values = {"config": config.model, "seed": config.seed, "device": torch.device("cpu")}
    model = GPT(config.model)
    for name, parameter in model.named_parameters():
        parameter.data = initial_value(name, parameter.shape, **values)
    data = TokenDataset(find_shards(config.data.train, ""), config.model.seq_len, 257)
    sequences = config.batch.sequences
    rows = torch.from_numpy(data.read(sample_order(0, sequences, len(data), config.seed)))
    return model(rows[:, :-1], rows[:, 1:], torch.ones(sequences), taps=(config.jepa.layer,))
