"""Check and measure a machine: does everything work, and is it as fast as expected?

Run it on one GPU, or under torchrun on all GPUs of a node:

    python -m jepa_dist.bench gpu --json gpu.json
    torchrun --rdzv-backend=loopback --nproc-per-node=gpu -m jepa_dist.bench gpu --json gpu.json

It needs no data: tokens are random. A configuration's batch is two micro-batches per rank. Each
part has its own time limit; one that hangs, crashes or exceeds it does not affect the others. The
floor (see bench step), checkpoints and replicas are measured for the first configuration only.
Figures are compared with the expected ranges of known cards; the exit code is 1 if a part failed or
a figure is worse than expected. Without CUDA it runs with toy sizes, for trying it out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from jepa_dist.bench.common import markdown_table
from jepa_dist.bench.expected import CARDS, Card, Expected
from jepa_dist.bench.parts import PARTS, plan
from jepa_dist.bench.session import Settings, Task
from jepa_dist.bench.supervisor import Outcome, Supervisor, meet
from jepa_dist.config import check_world
from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import launched_rank, launched_world_size

_CONFIGS = ("configs/gpt_36m.yaml", "configs/gpt_1b.yaml")
_MINUTES, _MINUTES_SMALL = 5.5, 60.0
# Limits are for GPUs.
_PATIENCE_SMALL = 10.0
# Their figures depend on the number of ranks.
_SHARDED = ("trainer", "hsdp", "floor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench gpu``."""
    parser.add_argument(
        "--config",
        nargs="+",
        default=list(_CONFIGS),
        metavar="FILE",
        help="configurations to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change these settings; the figures are then not compared with expected ones",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        metavar="PART",
        help=f"measure only these: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--no-floor", action="store_true", help="skip the bare loop, which takes long to compile"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        default=not torch.cuda.is_available(),
        help="use toy sizes, for trying it out (always without CUDA)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"skip parts that have not finished by then (default: {_MINUTES}; --small: no limit)",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for temporary checkpoints; several nodes must share it (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts.

    Raises:
        UserError: a configuration is invalid or does not fit the ranks, or the folder is missing.
    """
    ranks = launched_world_size()
    settings = Settings(tuple(arguments.set), arguments.small, ranks)
    _check(arguments, settings)
    names = [part for part in arguments.parts if not (part == "floor" and arguments.no_floor)]
    minutes = arguments.minutes or (_MINUTES_SMALL if arguments.small else _MINUTES)
    store = meet()
    with _shared_folder(store, arguments.dir) as folder:
        supervisor = Supervisor(
            store,
            settings,
            folder,
            seconds=60 * minutes,
            patience=_PATIENCE_SMALL if arguments.small else 1.0,
            report=_print_outcome,
        )
        processes = plan(names, arguments.config, ranks)
        outcomes = [outcome for tasks in processes for outcome in supervisor.run(tasks)]
    return {} if launched_rank() else _result(outcomes, settings, arguments.config)


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = [
        (row["task"], row["figure"], _shown(row["value"]), row["expected"], row["verdict"])
        for row in result["figures"]
    ]
    columns = ("part", "figure", "value", "expected", "")
    source = result["source"]
    head = f"{result['ranks']} rank(s); " + (
        f"expected of {result['card']}: {source}" if source else "no expected figures of this card"
    )
    sections = [head, markdown_table(columns, rows)]
    notes = [
        f"{outcome['task']}: {note}" for outcome in result["outcomes"] for note in _notes(outcome)
    ]
    sections.append("\n".join(notes))
    off = len(result["off"])
    sections.append(f"{off} finding(s), see below" if off else "ok: no problems found")
    return "\n\n".join(sections)


def _notes(outcome: Mapping[str, Any]) -> list[str]:
    if outcome["status"] != "ok":
        return [f"{outcome['status']}: {outcome['reason']}"]
    return outcome["measured"]["notes"]


# ---------------------------------------------------------------------------- before


def _check(arguments: argparse.Namespace, settings: Settings) -> None:
    problems = []
    if arguments.minutes is not None and arguments.minutes <= 0:
        problems.append(f"--minutes {arguments.minutes:g}: must be above 0")
    if not arguments.dir.is_dir():
        problems.append(f"--dir {arguments.dir}: not a folder; create it first")
    stems = [Path(path).stem for path in arguments.config]
    problems += [
        f"--config: two files named {stem}; give them different names"
        for stem in sorted({stem for stem in stems if stems.count(stem) > 1})
    ]
    for path in arguments.config:
        try:
            check_world(settings.config(path), settings.ranks)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


@contextmanager
def _shared_folder(store: Store, parent: Path) -> Iterator[Path]:
    """Yield a new folder, the same path on every rank, deleted at the end."""
    if launched_rank() == 0:
        store.set("bench/folder", tempfile.mkdtemp(prefix="jepa_dist_bench_", dir=parent))
    folder = Path(store.get("bench/folder").decode())
    try:
        yield folder
    finally:
        shutil.rmtree(folder if launched_rank() == 0 else folder / f"rank_{launched_rank()}", True)


def _print_outcome(outcome: Outcome) -> None:
    reason = f": {outcome.reason}" if outcome.reason else ""
    lines = [f"{outcome.task.label}: {outcome.status}, {outcome.seconds:.0f} s{reason}"]
    if outcome.status == "failed":
        lines += [f"    {line}" for line in outcome.log[-15:]]
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- after


def _result(
    outcomes: Sequence[Outcome], settings: Settings, configs: Sequence[str]
) -> dict[str, Any]:
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    card = None if settings.small else CARDS.get(name)
    figures = list(_figures(outcomes, card, settings))
    return {
        "configs": list(configs),
        "changes": list(settings.overrides),
        "ranks": settings.ranks,
        "small": settings.small,
        "card": name,
        "source": None if card is None else card.source,
        "outcomes": [_outcome_json(outcome) for outcome in outcomes],
        "figures": figures,
        "off": [*_off_parts(outcomes), *_off_figures(figures, name, card)],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    measured = outcome.measured
    return {
        **asdict(outcome),
        "task": outcome.task.label,
        "log": list(outcome.log),
        "measured": None if measured is None else measured.to_json(),
    }


def _figures(
    outcomes: Sequence[Outcome], card: Card | None, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table."""
    for outcome in outcomes:
        if outcome.measured is None:
            continue
        known = {} if card is None or _is_special(outcome.task, settings) else card.figures
        for figure, value in outcome.measured.figures.items():
            expected = known.get(f"{outcome.task.label}: {figure}")
            yield {
                "task": outcome.task.label,
                "figure": figure,
                "value": value,
                "expected": "" if expected is None else _range(expected),
                "verdict": "" if expected is None else expected.verdict(value),
            }


def _is_special(task: Task, settings: Settings) -> bool:
    """Return whether the card's expected figures do not apply to this task as it was run."""
    is_changed = task.config is not None and bool(settings.overrides)
    return is_changed or (settings.ranks > 1 and PARTS[task.part].process in _SHARDED)


def _off_parts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        if outcome.status == "failed":
            yield f"{outcome.task.label}: failed: {outcome.reason}"
        if outcome.measured is not None:
            for line in outcome.measured.off:
                yield f"{outcome.task.label}: {line}"


def _off_figures(
    figures: Sequence[Mapping[str, Any]], name: str, card: Card | None
) -> Iterator[str]:
    for row in figures:
        if card is not None and row["verdict"] == "OFF":
            yield (
                f"{row['task']}: {row['figure']} {_shown(row['value'])}; expected "
                f"{row['expected']} ({name}, {card.source})"
            )


def _range(expected: Expected) -> str:
    return f"{_shown(expected.low)} to {_shown(expected.high)}"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
