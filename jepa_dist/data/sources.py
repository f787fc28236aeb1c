"""The data sources of a configuration, and their mixture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jepa_dist.config import Config
from jepa_dist.config.schema import TrainSource, ValSource
from jepa_dist.data.mixture import Mixture, Stage, whole_weights
from jepa_dist.data.order import Ids
from jepa_dist.data.shards import find_shards, fingerprint, num_windows, read_count
from jepa_dist.errors import UserError


@dataclass(frozen=True)
class Source:
    """The shards of one source."""

    name: str
    """Its name; empty if the configuration has one pattern instead of a list."""
    key: str
    """The configuration key of its pattern."""
    pattern: str
    paths: tuple[Path, ...]

    @property
    def label(self) -> str:
        """Key and pattern, for messages."""
        return f"{self.key}={self.pattern!r}"


def find_sources(config: Config, split: str) -> list[Source]:
    """Return the sources of ``train`` or ``val``, in the order of the configuration.

    Raises:
        UserError: see ``find_shards``; of all sources at once.
    """
    found: list[Source] = []
    problems: list[str] = []
    for name, key, pattern in _patterns(config, split):
        try:
            found.append(Source(name, key, pattern, tuple(find_shards(pattern, key))))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _patterns(config: Config, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, key and pattern of each source."""
    data = config.data.train if split == "train" else config.data.val
    if isinstance(data, str):
        yield "", f"data.{split}", data
        return
    sources: Sequence[TrainSource | ValSource] = data
    for index, source in enumerate(sources):
        yield source.name, f"data.{split}[{index}].shards", source.shards


def find_split(config: Config, split: str) -> list[Path]:
    """Return the shards of all sources of ``train`` or ``val``, source by source.

    Raises:
        UserError: see ``find_shards``.
    """
    return [path for source in find_sources(config, split) for path in source.paths]


def training_order(config: Config) -> Mixture:
    """Return the order of the training samples, from the headers of the shards.

    Raises:
        UserError: no shards, or damaged ones.
    """
    sizes = [
        sum(num_windows(read_count(path), config.model.seq_len) for path in source.paths)
        for source in find_sources(config, "train")
    ]
    return Mixture(sizes, stages_of(config))


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Return the weights of the training sources over the places of the order."""
    sources = config.data.train
    if isinstance(sources, str):
        return (Stage(0, (1,)),)
    later = (
        Stage(
            first_step(stage.at, config.train.steps) * config.batch.sequences,
            whole_weights([stage.weights[source.name] for source in sources]),
        )
        for stage in config.data.stages
    )
    return (Stage(0, whole_weights([source.weight for source in sources])), *later)


def first_step(at: float, steps: int) -> int:
    """Return the first of ``steps`` steps whose fraction of the run is at least ``at``."""
    return math.ceil(Fraction(repr(at)) * steps)


def epoch_problems(config: Config, order: Mixture) -> Iterator[str]:
    """Yield the sources that the run would visit more often than ``epochs_at_most`` allows."""
    total = config.train.steps * config.batch.sequences
    drawn = order.draws_before(total)
    for source, count, size in zip(_named(config), drawn, order.sizes, strict=False):
        if source.epochs_at_most is not None and count > source.epochs_at_most * size:
            yield (
                f"data.train: {source.name}: epochs_at_most={source.epochs_at_most:g}, but the "
                f"run's {total:,} sequences draw {count:,} from it: {count / size:.2f} epochs of "
                f"its {size:,}; lower its weight or train.steps, or add shards"
            )


def describe_mixture(config: Config, order: Mixture) -> list[str]:
    """Return a line for each stage of a mixture: shares, and epochs by its end."""
    if not (sources := _named(config)):
        return []
    sequences = config.batch.sequences
    ends = [*(stage.first for stage in order.stages[1:]), config.train.steps * sequences]
    lines = []
    for stage, end in zip(order.stages, ends, strict=True):
        drawn, total = order.draws_before(end), sum(stage.weights)
        parts = (
            f"{source.name} {weight / total:.2%} ({count / size:.2f} epochs by its end)"
            for source, weight, count, size in zip(
                sources, stage.weights, drawn, order.sizes, strict=True
            )
        )
        lines.append(f"mixture from step {stage.first // sequences} on: {', '.join(parts)}")
    return lines


def mixture_metrics(config: Config, order: Mixture, first: int, end: int) -> dict[str, float]:
    """Return the metrics of a mixture in a step; empty without a list of sources.

    Args:
        config: The run.
        order: Order of its samples.
        first: The step's first place in the order.
        end: The place after its last.

    Returns:
        ``mixture/share/NAME``, the share of the source in the step (0 to 1), and
        ``mixture/epochs/NAME``, how often its sequences have been visited after the step.
    """
    weights, drawn = order.stage_at(first).weights, order.draws_before(end)
    metrics = {}
    for source, weight, count, size in zip(
        _named(config), weights, drawn, order.sizes, strict=False
    ):
        metrics[f"mixture/share/{source.name}"] = weight / sum(weights)
        metrics[f"mixture/epochs/{source.name}"] = count / size
    return metrics


def mixed_names(config: Config) -> tuple[str, ...]:
    """Return the names of the sources of training if there are several, else an empty tuple."""
    names = tuple(source.name for source in _named(config))
    return names if len(names) > 1 else ()


def source_losses(
    config: Config, order: Mixture, places: Ids, values: Mapping[str, float]
) -> dict[str, float | None]:
    """Return ``loss/ce/NAME`` of a step, the mean over a source's targets.

    Args:
        config: The run.
        order: Order of its samples.
        places: Places of the step's samples in the order, int64 [sequences].
        values: The step's numbers: ``ce/NAME``, the sums over the targets of each source, divided
            by the number of all targets; without them the result is empty.

    Returns:
        The losses by name; None for a source that the step did not draw from.
    """
    names = [name for name in mixed_names(config) if f"ce/{name}" in values]
    if not names:
        return {}
    counts = np.bincount(order.draw(places)[0], minlength=len(names)).tolist()
    return {
        f"loss/ce/{name}": values[f"ce/{name}"] * len(places) / count if count else None
        for name, count in zip(names, counts, strict=True)
    }


def _named(config: Config) -> Sequence[TrainSource]:
    """Return the training sources if they are a list, else an empty tuple."""
    return () if isinstance(config.data.train, str) else config.data.train


def fingerprint_split(config: Config, split: str) -> dict[str, Any]:
    """Return what identifies the data of ``train`` or ``val``, as JSON data.

    For one source it is the ``fingerprint`` of its shards. For several, ``sources`` has digest and
    tokens of each, the names in ``files`` begin with the source's, and ``digest`` covers all that
    the order of samples depends on: the digests in order and, for training, the weights and the
    places where they change.

    Raises:
        UserError: no shards, or damaged ones.
    """
    sources = find_sources(config, split)
    found = {source.name: fingerprint(source.paths) for source in sources}
    if len(found) == 1:
        return next(iter(found.values()))
    stages = stages_of(config) if split == "train" else ()
    identity = (
        [entry["digest"] for entry in found.values()],
        [(stage.first, stage.weights) for stage in stages],
    )
    return {
        "digest": hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest(),
        "tokens": sum(entry["tokens"] for entry in found.values()),
        "files": [
            {**file, "name": f"{name}/{file['name']}"}
            for name, entry in found.items()
            for file in entry["files"]
        ],
        "sources": {
            name: {"digest": entry["digest"], "tokens": entry["tokens"]}
            for name, entry in found.items()
        },
    }
