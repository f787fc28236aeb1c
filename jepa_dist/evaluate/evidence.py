"""``jepa_dist evaluate RUN --tasks FILE ... --probe FILE ... --quantize BITS ...``: evidence beyond
bits per byte."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_dist.config import Config
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.linear_probe import check_documents, probe
from jepa_dist.evaluate.linear_probe import describe as describe_probes
from jepa_dist.evaluate.passes import Passes
from jepa_dist.evaluate.quantized import QuantizationPlan, evaluate_quantized, plan_quantization
from jepa_dist.evaluate.quantized import describe as describe_quantized
from jepa_dist.evaluate.settings import EVALUATION, QUANTIZED_EVALUATION
from jepa_dist.evaluate.task_file import TaskFile, check_names, check_tasks
from jepa_dist.evaluate.tasks import describe as describe_tasks
from jepa_dist.evaluate.tasks import score_task
from jepa_dist.evaluate.weights import Source, load_model
from jepa_dist.monitor.evaluation_file import (
    Evaluation,
    ProbeResult,
    QuantizedResult,
    TaskResult,
    write_evaluation,
)
from jepa_dist.parallel.world import World

_ONLY_OTHERWISE = ("sliding", "stride", "compare")
_WIDTHS = tuple(map(str, range(2, 9)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for further evidence to the parser of ``jepa_dist evaluate``."""
    group = parser.add_argument_group("in place of bits per byte")
    add = group.add_argument
    for option, help_text in (
        ("--tasks", "likelihood tasks: JSON Lines with context, choices and answer"),
        ("--probe", "linear probe of the hidden states: JSON Lines with text and label"),
    ):
        files: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "FILE"}
        add(option, action="extend", default=[], help=help_text, **files)
    add("--layer", type=int, help="block whose states to probe (default -1: the final state)")
    add(
        "--quantize",
        nargs="+",
        action="extend",
        default=[],
        metavar="BITS",
        help="cost of quantization to BITS bits (2 to 8), as in export --format artifact; "
        "KEY=VALUE may also set quantization.* and data.train",
    )
    add("--per-item", type=Path, metavar="OUT", help="write the scores of each item of the tasks")
    add("--json", type=Path, metavar="OUT", help="write the results to this file, too")


def is_evidence(arguments: argparse.Namespace) -> bool:
    """Return whether the command line has an option of this module."""
    return bool(arguments.tasks or arguments.probe or arguments.quantize)


def split_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Separate KEY=VALUE from the lists, parse bits, and raise for options without effect."""
    for name in ("tasks", "probe"):
        given: list[Path] = getattr(arguments, name)
        overrides = [str(path) for path in given if "=" in str(path) and not path.exists()]
        arguments.overrides += overrides
        setattr(arguments, name, [path for path in given if str(path) not in overrides])
    arguments.overrides += [item for item in arguments.quantize if "=" in item]
    widths = [item for item in arguments.quantize if "=" not in item]
    wrong = [item for item in widths if item not in _WIDTHS]
    if wrong or (arguments.quantize and not widths):
        shown = f" {wrong[0]}" if wrong else ""
        parser.error(f"--quantize{shown}: expected numbers of bits, 2 to 8")
    arguments.quantize = [int(item) for item in widths]
    if is_evidence(arguments):
        without = [name for name in _ONLY_OTHERWISE if getattr(arguments, name)]
        if without:
            parser.error(f"--{without[0]}: has no effect on --tasks, --probe and --quantize")
    for name, needed in (("layer", "probe"), ("per_item", "tasks")):
        if getattr(arguments, name) is not None and not getattr(arguments, needed):
            parser.error(f"--{name.replace('_', '-')}: only with --{needed}")
    if arguments.json is not None and not is_evidence(arguments):
        parser.error("--json: only with --tasks, --probe or --quantize")


@dataclass(frozen=True)
class Evidence:
    """A checked evaluation of tasks, probes and quantization."""

    source: Source
    config: Config
    tokenizer: Tokenizer | None
    """None only if there are no tasks and no probes."""
    tasks: list[TaskFile]
    probes: list[TaskFile]
    layer: int
    quantization: QuantizationPlan | None
    per_item: Path | None
    json: Path | None

    def run(self, world: World) -> None:
        """Evaluate, print and write the results. Collective.

        Raises:
            UserError: a file cannot be written.
        """
        tasks, probes = self._score_texts(world)
        evaluation = Evaluation(
            step=self.source.description.step,
            weights=self.source.description.weights,
            tasks=tasks,
            probes=probes,
            quantized=self._score_quantized(world),
        )
        if world.is_main:
            lines = [*describe_tasks(evaluation.tasks), *describe_probes(evaluation.probes)]
            print(*lines, *describe_quantized(evaluation.quantized), sep="\n")
            if self.json is not None:
                write_evaluation(self.json, evaluation)

    def _score_texts(self, world: World) -> tuple[dict[str, TaskResult], dict[str, ProbeResult]]:
        """Return the results of tasks and probes, which share a model."""
        if self.tokenizer is None or not (self.tasks or self.probes):
            return {}, {}
        passes = Passes(
            model=load_model(self.source, self.config.parallel, world),
            config=self.config,
            phase=self.source.description.phase,
            device=world.device,
            rank=world.rank,
            world_size=world.world_size,
        )
        tasks = self._score_tasks(passes, self.tokenizer, world)
        return tasks, {
            each.name: probe(each, self.tokenizer, passes, self.layer) for each in self.probes
        }

    def _score_tasks(
        self, passes: Passes, tokenizer: Tokenizer, world: World
    ) -> dict[str, TaskResult]:
        """Score the tasks; rank 0 writes the ``--per-item`` file."""
        if self.per_item is None or not world.is_main:
            return {task.name: score_task(task, tokenizer, passes) for task in self.tasks}
        try:
            with open(self.per_item, "w", encoding="utf-8") as file:
                return {task.name: score_task(task, tokenizer, passes, file) for task in self.tasks}
        except OSError as error:
            raise UserError(f"--per-item {self.per_item}: {error.strerror}") from None

    def _score_quantized(self, world: World) -> list[QuantizedResult]:
        if self.quantization is None:
            return []
        bytes_of = None if self.tokenizer is None else self.tokenizer.byte_counter()
        return evaluate_quantized(self.quantization, self.source, self.config, bytes_of, world)


def check_evidence(arguments: argparse.Namespace, source: Source) -> Evidence:
    """Read all given files, and check them against the model.

    Args:
        arguments: The command line, processed by ``split_options``.
        source: The model.

    Raises:
        UserError: invalid settings, a bad line, a choice too long for the model, no such layer, no
            tokenizer, no data, or nothing to quantize.
    """
    relevant = QUANTIZED_EVALUATION if arguments.quantize else EVALUATION
    config = relevant.resolve(source.description.config, arguments.overrides)
    has_texts = bool(arguments.tasks or arguments.probe)
    tokenizer = load_checked_tokenizer(config, ("val",) if arguments.quantize else ())
    if tokenizer is None and has_texts:
        raise UserError(
            "data.tokenizer=null: tasks and probes are text; name the tokenizer of the run "
            "(data.tokenizer=...)"
        )
    layer, blocks = arguments.layer, config.model.num_layers
    layer = -1 if layer is None else layer
    if not -1 <= layer < blocks:
        raise UserError(f"--layer {layer}: expected -1 (the final state) to {blocks - 1}")
    probes = [check_documents(path) for path in arguments.probe]
    check_names(probes, "--probe")
    length = config.model.seq_len
    return Evidence(
        source=source,
        config=config,
        tokenizer=tokenizer,
        tasks=[] if tokenizer is None else check_tasks(arguments.tasks, tokenizer, length),
        probes=probes,
        layer=layer,
        quantization=plan_quantization(arguments.quantize, config) if arguments.quantize else None,
        per_item=arguments.per_item,
        json=arguments.json,
    )
