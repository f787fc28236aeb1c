"""``parallel.deterministic`` reaches PyTorch, cuBLAS and Inductor, and a run trains with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from jepa_dist.config import Config
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from tests.support.ranks import run_ranks
from tests.support.runs import Recorder
from tests.support.tiny import tiny_config, write_corpus


def train(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    recorder = Recorder()
    build_trainer(config, start_world(config.parallel)).run(recorder)
    return {
        "losses": [record["loss/total"] for record in recorder.records],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "inductor": torch._inductor.config.deterministic,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def test_deterministic_algorithms(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    steps = {"train__steps": 3}
    usual = run_ranks(train, 1, tiny_config(tmp_path, **steps))[0]
    asked = run_ranks(train, 1, tiny_config(tmp_path, parallel__deterministic=True, **steps))[0]
    assert asked["losses"] == usual["losses"]  # the CPU always is
    assert (usual["deterministic"], usual["inductor"], usual["cublas"]) == (False, False, None)
    assert (asked["deterministic"], asked["inductor"], asked["cublas"]) == (True, True, ":4096:8")
