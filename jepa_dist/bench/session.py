"""State shared by the parts of ``bench gpu`` in one process: ranks, configurations, trainers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from jepa_dist.bench.common import synchronize, with_random_data
from jepa_dist.bench.training import steady, stepper, with_objective
from jepa_dist.config import Config, load
from jepa_dist.parallel.world import World
from jepa_dist.process.garbage import ScheduledCollection
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.loop import Trainer
from jepa_dist.training.records import compiled_graphs

# Micro-batches per step: the minimum with gradient accumulation.
_MICRO_BATCHES = 2


class Skipped(Exception):  # noqa: N818 - nothing is wrong
    """A part has nothing to measure here; the message says why."""


class Task(NamedTuple):
    """One part, for one configuration if it depends on one."""

    part: str
    config: str | None = None

    @property
    def label(self) -> str:
        """The part and the configuration's name: ``step gpt_36m``."""
        return self.part if self.config is None else f"{self.part} {Path(self.config).stem}"


@dataclass(frozen=True)
class Measured:
    """Results of a part."""

    figures: Mapping[str, float]
    """By name, whose last word is the unit; shown, and compared with the expected ranges."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Only written to the JSON file."""
    off: Sequence[str] = ()
    """Problems, whatever the machine, one line each."""
    notes: Sequence[str] = ()
    """Shown below the figures, one line each."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data for ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` wrote."""
        return cls(**value)


@dataclass(frozen=True)
class Settings:
    """Settings of all parts."""

    overrides: tuple[str, ...]
    """The user's overrides, as KEY=VALUE."""
    small: bool
    """Whether to use toy sizes."""
    ranks: int

    def config(self, path: str) -> Config:
        """Return the configuration at ``path``, with two micro-batches per rank unless overridden.

        Raises:
            UserError: the configuration is not valid.
        """
        shrunk = _small(load(path).config) if self.small else []
        micro = load(path, [*shrunk, *self.overrides]).config.batch.micro
        batch = f"batch.sequences={_MICRO_BATCHES * micro * self.ranks}"
        return load(path, [*shrunk, batch, *self.overrides]).config


def _small(config: Config) -> list[str]:
    """Return overrides that shrink the model but keep its kinds of blocks."""
    model = config.model
    changes = {
        "num_layers": 3,
        "model_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2 if model.num_kv_heads < model.num_heads else 4,
        "seq_len": 64,
        "vocab_size": 1024,
        "rope_dims": min(model.rope_dims, 8),
        "xsa_last_n": min(model.xsa_last_n, 3),
    }
    if model.num_loops:
        changes |= {"loop_start": 1, "loop_end": 1}
    if model.parallel_residual_start >= 0:
        changes |= {"parallel_residual_start": 2}
    sizes = [f"model.{name}={value}" for name, value in changes.items()]
    return [*sizes, "batch.micro=2", "jepa.layer=-1"]


@dataclass(frozen=True)
class WarmTrainer:
    """A trainer whose graphs are compiled and whose optimizer has its state."""

    trainer: Trainer
    step: Callable[[], None]
    build_seconds: float
    first_step_seconds: float


class Session:
    """Context of the parts that one process measures, one after the other.

    Args:
        world: The ranks.
        settings: The command's settings.
        folder: For data and checkpoints; the same on all ranks.
    """

    def __init__(self, world: World, settings: Settings, folder: Path) -> None:
        self.world = world
        self.settings = settings
        self.folder = folder
        self._warm: dict[str, WarmTrainer] = {}
        self._collections: list[ScheduledCollection] = []

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.world.device

    @property
    def small(self) -> bool:
        """Whether to use toy sizes."""
        return self.settings.small

    def config(self, path: str) -> Config:
        """Return a configuration on random data: uniform steps, the objective present but off."""
        config = with_objective(self.settings.config(path), start_frac=1.0)
        folder = self.folder / f"rank_{self.world.rank}" / Path(path).stem
        folder.mkdir(parents=True, exist_ok=True)
        return with_random_data(steady(config, 1000, 1000), folder)

    def warm(self, path: str) -> WarmTrainer:
        """Return the configuration's trainer after two steps; built at the first call."""
        if path not in self._warm:
            self._warm[path] = self._warm_up(self.config(path))
        return self._warm[path]

    def _warm_up(self, config: Config) -> WarmTrainer:
        began = time.perf_counter()
        collection = ScheduledCollection(config.train.gc_every)
        self._collections.append(collection)
        trainer = build_trainer(config, self.world)
        built = time.perf_counter()
        step = _collecting(stepper(trainer), collection)
        step()
        synchronize(self.device)
        first = time.perf_counter()
        step()
        synchronize(self.device)
        return WarmTrainer(trainer, step, built - began, first - built)

    def close(self) -> None:
        """Close the data loaders, and collect garbage automatically again."""
        for warm in self._warm.values():
            warm.trainer.segment.batches.close()
        for collection in reversed(self._collections):
            collection.close()


def _collecting(step: Callable[[], None], collection: ScheduledCollection) -> Callable[[], None]:
    """Return ``step`` followed by garbage collection where a run has it.

    An automatic collection can take longer than a step, and would be measured with whatever it
    interrupts.
    """
    steps = itertools.count()

    def collecting_step() -> None:
        step()
        collection.after_step(next(steps), compiled_graphs())

    return collecting_step
