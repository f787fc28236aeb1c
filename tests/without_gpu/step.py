"""The trainer's step as rank 0 of many on tensors without data: waits and collectives.

``python -m tests.without_gpu.step OUT CONFIG --ranks 64 [--looped] [--set KEY=VALUE ...]``, in the
environment of ``environment.py``. ``Trainer.run`` itself runs, eagerly, with a process group that
sends nothing; one step after the first ones is watched. What is left out: the contents of compiled
regions (no operator in them can wait), and the comparison of notes of Muon's first step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from jepa_dist.bench.collectives import CollectiveCounter
from jepa_dist.bench.comm import minimum
from jepa_dist.bench.common import with_random_data
from jepa_dist.config import Config, ProfileConfig, load
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.monitor.profiler import StepProfiler
from jepa_dist.optim.muon import Muon
from jepa_dist.parallel.world import World, build_mesh
from jepa_dist.training.assemble import build_trainer
from tests.without_gpu import pretend
from tests.without_gpu.waits import WaitDetector, pretend_streams

# Steps before the watched one, which fill caches and plans.
_FIRST_STEPS = 2


class _WatchedError(Exception):
    """Ends the run after the watched step."""


class _Watch(StepProfiler):
    """In place of the profiler, which is called at the beginning of every step."""

    def __init__(self) -> None:
        super().__init__(ProfileConfig(), Path(), rank=0)
        self.waits = WaitDetector()
        self.collectives = CollectiveCounter()
        self._begun = 0

    def step(self) -> None:
        if self._begun == _FIRST_STEPS:
            self.waits.__enter__()
            self.collectives.__enter__()
        elif self._begun == _FIRST_STEPS + 1:
            self.collectives.__exit__(None, None, None)
            self.waits.__exit__(None, None, None)
            raise _WatchedError
        self._begun += 1


class _World(World):
    """Rank 0 of many that do not exist: all gathered values are its own."""

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def run_on_main(self, fn: Any) -> Any:
        return fn()


def watch_step(config: Config, ranks: int) -> _Watch:
    """Run the trainer until a step has been watched; only here are its internals used."""
    watch = _Watch()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = build_mesh(config.parallel, ranks, pretend.DEVICE)
    world = _World(
        rank=0,
        local_rank=0,
        world_size=ranks,
        device=pretend.DEVICE,
        mesh=mesh,
        control=dist.new_group(),
        timeout=timedelta(seconds=60),
    )
    with (
        # This reads a value from the device, which has no data.
        patch.object(Muon, "_require_equal_on_all_ranks", lambda muon, present: None),
        # Checksums are read once, before the first step, and have no values.
        patch("jepa_dist.training.assemble.check_replicas", _nothing),
        # Random numbers of all parameters take longer than everything else.
        patch("jepa_dist.build.initial_value", _zeros),
        # It would move the buffers to the device before they are replaced there.
        patch("torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device", _nothing),
        pretend.OnlyDeviceFake(),
    ):
        try:
            build_trainer(config, world).run(profiler=watch)
        except _WatchedError:
            return watch
    raise AssertionError("the run ended before the step")


def _zeros(name: str, shape: torch.Size, *, device: torch.device, **_: Any) -> torch.Tensor:
    return torch.zeros((), device=device).expand(shape)


def _nothing(*_: Any) -> None:
    pass


def prepare(config: Config, folder: Path) -> Config:
    """Return the configuration with random data, eager, and without rare events."""
    changes: dict[str, dict[str, Any]] = {
        "parallel": {"compile": False},
        "train": {"max_wallclock_seconds": None, "log_every": 10**6, "steps": 10**6},
        "monitor": {"jepa_every": 0, "histogram_every": 0},
        "eval": {"every": 0},
        "data": {"workers": 0},
    }
    config = config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in changes.items()
        }
    )
    return with_random_data(config, folder)


def main() -> None:
    """Watch a step and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the result")
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--looped", action="store_true", help="in the last recurrence phase")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    loops = {"enable_looping_at": 0, "loop_phase2_at": 0} if arguments.looped else {}
    changes = [f"train.{name}={value}" for name, value in loops.items()]
    pretend.pretend_device()
    pretend_streams()
    pretend.attend_with("cudnn")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = load(arguments.config, [*changes, *arguments.set], {}).config
        config = prepare(config, Path(folder))
        watch = watch_step(config, arguments.ranks)
    phase = LAST_PHASE if arguments.looped else 0
    must = minimum(config, arguments.ranks, phase, pretend.DEVICE)
    result = {
        "waits": watch.waits.found,
        "operators": watch.waits.operators,
        "launches": dict(watch.collectives.counts),
        "expected": {kind: least.launches for kind, least in must.items()},
        "seconds": time.monotonic() - began,
    }
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
