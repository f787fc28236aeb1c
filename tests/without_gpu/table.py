"""Kernels and bytes of every compiled graph: the committed table, the comparison, predicted times.

Imports nothing of PyTorch: the tests read tables that a process of another environment wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).with_name("expected.json")
UPDATE_COMMAND = "python -m tests.without_gpu update"
TOLERANCE = 0.02
ATTENTION = ("cudnn", "flash")
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Graph:
    """One compiled graph, shared by all identical regions and named after the first."""

    config: str
    """Name of the configuration, such as ``gpt_36m``."""
    region: str
    """``embed``, ``blocks.0``, ``skip``, ``head`` or ``objective.span``."""
    direction: str
    """``forward``, ``backward``, or ``validation`` (forward without gradient)."""
    kernels: int
    """Launches of generated kernels."""
    bytes: int
    """Bytes that these read and write, as counted by Inductor."""
    calls: Mapping[str, int]
    """Launches of library functions (matrix products, attention)."""
    flops: int
    """FLOPs of the matrix products."""
    sources: int
    """Different generated kernels."""
    cubins: int
    """How many of them Triton and ptxas assembled."""
    runs: Mapping[str, int]
    """Executions in one pass over the model, by recurrence phase."""
    attention: str = ""
    """Back end of attention; only blocks have one."""
    checkpointing: str = ""
    """Activation checkpointing; only blocks have it."""

    @property
    def key(self) -> str:
        """Name in the table, such as ``gpt_36m blocks.0 cudnn none backward``."""
        parts = (self.config, self.region, self.attention, self.checkpointing, self.direction)
        return " ".join(part for part in parts if part)

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts that are compared with the table."""
        return {"kernels": self.kernels, "calls": sum(self.calls.values()), "bytes": self.bytes}


@dataclass(frozen=True)
class Table:
    """The graphs of one run, and the compiler's errors."""

    torch: str
    """Version that compiled them; another one generates other kernels."""
    graphs: tuple[Graph, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Errors of variants that did not compile, by configuration and variant."""
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a table that ``write`` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**data | {"graphs": tuple(Graph(**graph) for graph in data["graphs"])})

    def write(self, path: Path) -> None:
        """Write the table to a file, for another process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def of(self, config: str) -> list[Graph]:
        """Return the graphs of one configuration."""
        return [graph for graph in self.graphs if graph.config == config]


# ---------------------------------------------------------------------------- committed table


def read_expected(path: Path = EXPECTED) -> dict[str, Any]:
    """Return the committed table: ``torch`` (version) and ``graphs`` (counts by key)."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_expected(table: Table, path: Path = EXPECTED) -> None:
    """Replace the rows of this table's configurations in the committed one.

    There is one line per graph, so that a diff shows what changed.

    Raises:
        ValueError: the table is not complete, or the rest is of another version of torch.
    """
    if table.failures:
        raise ValueError(f"not written, since these do not compile: {', '.join(table.failures)}")
    before: dict[str, Any] = {"torch": table.torch, "graphs": {}}
    if path.exists():
        before = read_expected(path)
    configs = {graph.config for graph in table.graphs}
    kept = {key: row for key, row in before["graphs"].items() if key.split()[0] not in configs}
    if kept and before["torch"] != table.torch:
        raise ValueError(f"not written: the other rows are of torch {before['torch']}")
    counts = kept | {graph.key: graph.counts for graph in table.graphs}
    lines = [f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(counts.items())]
    text = f'{{\n  "torch": {json.dumps(table.torch)},\n  "graphs": {{\n'
    path.write_text(text + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")


def of_configs(
    expected: Mapping[str, Mapping[str, int]], graphs: Iterable[Graph]
) -> dict[str, Mapping[str, int]]:
    """Return the rows of the configurations that these graphs belong to."""
    configs = {graph.config for graph in graphs}
    return {key: row for key, row in expected.items() if key.split()[0] in configs}


def differences(expected: Mapping[str, Mapping[str, int]], graphs: Iterable[Graph]) -> list[str]:
    """Return a line for each count that differs by more than 2 % and each graph added or removed.

    A line names the graph, the values before and after, and the command that updates the table.
    """
    found = {graph.key: graph.counts for graph in graphs}
    lines = [
        _line(key, name, expected[key][name], found[key][name])
        for key in found
        if key in expected
        for name in found[key]
        if abs(found[key][name] - expected[key][name]) > TOLERANCE * expected[key][name]
    ]
    lines += [f"{key}: is compiled now, and was not before" for key in found.keys() - expected]
    lines += [f"{key}: was compiled before, and is not now" for key in expected.keys() - found]
    if lines:
        lines.append(
            f"if this is meant: run `{UPDATE_COMMAND}`, and give the reason in the commit's message"
        )
    return sorted(lines[:-1]) + lines[-1:]


def _line(key: str, name: str, before: int, after: int) -> str:
    change = f"{(after / before - 1) * 100:+.1f} %" if before else "new"
    return f"{key}: {name} {before:,} -> {after:,} ({change})"
