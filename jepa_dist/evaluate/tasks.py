"""Accuracy in likelihood tasks: the model's answer is the choice of the largest log-likelihood."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.evaluate.passes import Floats, Passes
from jepa_dist.evaluate.task_file import Item, TaskFile, encode, read_json_lines
from jepa_dist.monitor.evaluation_file import TaskResult

# Number of items that are held, encoded and sorted by length together.
_ITEMS_HELD = 1024


@dataclass(frozen=True)
class ItemResult:
    """An item's scores."""

    line: int
    item: Item
    log_likelihoods: Floats
    """Log-likelihood of each choice, summed over its tokens, in nats."""
    num_cut: int
    """Number of choices whose context was truncated."""

    @property
    def num_bytes(self) -> list[int]:
        """Bytes of each choice."""
        return [len(choice.encode()) for choice in self.item.choices]

    @property
    def choice(self) -> int:
        """The most likely choice; the first of equal ones."""
        return int(self.log_likelihoods.argmax())

    @property
    def choice_per_byte(self) -> int:
        """The choice of the largest log-likelihood per byte."""
        return int((self.log_likelihoods / self.num_bytes).argmax())

    def to_json(self, task: str) -> str:
        """Return a line of the ``--per-item`` file."""
        return json.dumps(
            {
                "task": task,
                "line": self.line,
                "answer": self.item.answer,
                "choice": self.choice,
                "choice_per_byte": self.choice_per_byte,
                "log_likelihoods": self.log_likelihoods.tolist(),
                "bytes": self.num_bytes,
                "cut": self.num_cut,
            }
        )


def score_task(
    task: TaskFile, tokenizer: Tokenizer, passes: Passes, per_item: IO[str] | None = None
) -> TaskResult:
    """Score all items of a file; the same result on every rank. Collective.

    Args:
        task: From ``check_tasks``.
        tokenizer: Tokenizer of the model.
        passes: The model.
        per_item: File to write one line per item to.

    Raises:
        UserError: the file has become invalid since it was checked.
    """
    correct, correct_per_byte, chance, num_cut = 0, 0, 0.0, 0
    for result in _score_items(task, tokenizer, passes):
        correct += result.choice == result.item.answer
        correct_per_byte += result.choice_per_byte == result.item.answer
        chance += 1 / len(result.item.choices)
        num_cut += result.num_cut > 0
        if per_item is not None:
            per_item.write(result.to_json(task.name) + "\n")
    count = task.num_items
    return TaskResult(
        digest=task.digest,
        items=count,
        accuracy=correct / count,
        accuracy_per_byte=correct_per_byte / count,
        chance=chance / count,
        cut=num_cut,
    )


def _score_items(task: TaskFile, tokenizer: Tokenizer, passes: Passes) -> Iterator[ItemResult]:
    seq_len = passes.config.model.seq_len
    lines = read_json_lines(task.path, Item)
    while held := list(itertools.islice(lines, _ITEMS_HELD)):
        by_item = [encode(item, tokenizer, seq_len, task.path, number) for number, item in held]
        requests = list(itertools.chain.from_iterable(by_item))
        totals = passes.log_likelihoods(requests, task.name).total_N
        ends = np.cumsum([len(requests) for requests in by_item])[:-1]
        for (number, item), scores, asked in zip(
            held, np.split(totals, ends), by_item, strict=True
        ):
            num_cut = sum(request.is_cut(seq_len) for request in asked)
            yield ItemResult(number, item, scores, num_cut)


def describe(results: dict[str, TaskResult]) -> list[str]:
    """Return a table of results, and notes on truncated contexts; empty without results."""
    if not results:
        return []
    lines = [f"{'task':<16} {'items':>6}  {'accuracy':<17}  {'per byte':<17}  chance"]
    for name, one in results.items():
        total = f"{one.accuracy:.4f} +- {one.error(one.accuracy):.4f}"
        per_byte = f"{one.accuracy_per_byte:.4f} +- {one.error(one.accuracy_per_byte):.4f}"
        lines.append(f"{name:<16} {one.items:>6}  {total}  {per_byte}  {one.chance:.4f}")
    lines += [
        f"note     {name}: the context of {one.cut} of {one.items} items is longer than the model; "
        "its beginning was cut off"
        for name, one in results.items()
        if one.cut
    ]
    return lines
