"""The graphs that a training run compiles, counted by a backend that does not compile them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jepa_dist.config import Config
from jepa_dist.objectives.objective import Objective, Sums
from jepa_dist.objectives.registry import OBJECTIVES
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from tests.support.runs import Recorder
from tests.support.tiny import tiny_config


class CountingBackend:
    """A backend in place of Inductor: runs graphs eagerly and records their code."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(module.print_readable(print_output=False))
        return module.forward


def count(
    rank: int, world_size: int, config: Config, without_jepa_code: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train with the counting backend; return the records and the code of all graphs."""
    backend = CountingBackend()
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: plain(self, backend=backend, **options)
    if without_jepa_code:
        for objective in OBJECTIVES.values():
            objective.forward = _no_such_code  # type: ignore[method-assign]
    recorder = Recorder()
    build_trainer(config, start_world(config.parallel)).run(recorder)
    return recorder.records, backend.graphs


def _no_such_code(self: Objective, *args: torch.Tensor) -> Sums:
    raise AssertionError("the JEPA code must not run")


def compiled(corpus: Path, **changes: Any) -> Config:
    """Return the tiny recipe with compilation on."""
    return tiny_config(corpus, parallel__compile=True, **changes)
