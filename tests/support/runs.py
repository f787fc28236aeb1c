"""Training runs on the ranks of a test: their records, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.checkpoint import Checkpointer, RetentionPolicy
from jepa_dist.config import Config, to_dict
from jepa_dist.parallel.world import start_world
from jepa_dist.start.resume import find_start
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.listeners import SILENT, Silent

# Everything that has state: Muon, EMA, accumulation, recurrence phases, an objective with a head.
STATEFUL = {
    "jepa__objective": "next_state",
    "optim__matrix": "muon",
    "optim__matrix_lr": 0.005,
    "optim__ema_decay": 0.9,
    "jepa__start_frac": 0.2,
    "jepa__ramp_frac": 0.5,
    "batch__micro": 2,
}


class Recorder(Silent):
    """The records that a reporter would publish."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any] | None) -> None:
        if record is not None:
            self.records.append(record)


def train(rank: int, world_size: int, config: Config) -> list[dict[str, Any]]:
    """Train without checkpoints; return the records (of rank 0) and the summary."""
    world = start_world(config.parallel)
    recorder = Recorder()
    outcome = build_trainer(config, world).run(recorder if rank == 0 else Silent())
    return [*recorder.records, outcome.summary()]


def train_resumable(
    rank: int, world_size: int, config: Config, fingerprint: str = "data"
) -> dict[str, Any]:
    """Train as the command does, from the newest checkpoint; return records and the final state."""
    world = start_world(config.parallel)
    run_dir = Path(config.run.dir)
    start = find_start(config, run_dir, fingerprint, world)
    checkpointer = Checkpointer(run_dir / "checkpoints", world, RetentionPolicy(last=2))
    identity = {"config": to_dict(config), "data_fingerprint": fingerprint}
    trainer = build_trainer(config, world, checkpointer, start.checkpoint, identity)
    recorder = Recorder()
    outcome = trainer.run(recorder if rank == 0 else SILENT)
    checkpointer.close()
    state = {name: _full(tensor) for name, tensor in trainer.state.tensors().items()}
    return {
        "records": [*recorder.records, outcome.summary()],
        "state": state,
        "start": start,
        "samples": trainer.segment.batches.samples_consumed,
    }


def _full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def assert_same_run(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Assert the same tokens, and losses and gradient norms that differ by rounding only."""
    assert len(ours) == len(reference)
    for record, expected in zip(ours, reference, strict=True):
        assert record["tokens_digest"] == expected["tokens_digest"]
        for key in ("loss/ce", "loss/jepa", "loss/total", "grad_norm", "val/loss", "val/bpb"):
            if expected.get(key) is not None:
                limit = 1e-4 if key == "grad_norm" else 1e-5
                assert record[key] == pytest.approx(expected[key], rel=limit), key
