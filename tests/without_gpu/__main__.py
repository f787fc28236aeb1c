"""``python -m tests.without_gpu``: make the environment, print or rewrite the table, watch steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_dist.bench.common import markdown_table
from jepa_dist.config import Config, load
from tests.without_gpu import environment, run
from tests.without_gpu.roofline import predict, step_milliseconds
from tests.without_gpu.table import (
    ATTENTION,
    CHECKPOINTING,
    Table,
    differences,
    read_expected,
    write_expected,
)


def main() -> None:
    """Run the command that is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.without_gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="make the environment (downloads some 4 GB)")
    install.add_argument("folder", nargs="?", type=Path, default=environment.default_folder())
    for name, text in (
        ("table", "compile; print kernels, bytes and predicted times, and what changed"),
        ("update", "compile everything and make the result the committed table"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "table":
            command.add_argument("configs", nargs="*", type=Path, default=run.CONFIGS)
            command.add_argument("--save", type=Path, help="keep the counts in this file as well")
            command.add_argument("--load", type=Path, help="print this file; compile nothing")
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            _install(arguments.folder)
        elif arguments.command == "update":
            sys.exit(_update())
        else:
            sys.exit(_table(arguments))
    except environment.UnavailableError as error:
        parser.exit(2, f"without_gpu: {error}\n")


def _install(folder: Path) -> None:
    python = environment.install(folder)
    if folder != environment.default_folder():
        print(f"export {environment.VARIABLE}={python}")


def _update() -> int:
    table = run.compile_regions()
    _print_failures(table)
    if table.failures:
        return 1
    before = read_expected()["graphs"]
    write_expected(table)
    print("\n".join(differences(before, table.graphs)[:-1]) or "no change of more than 2 %")
    return 0


def _table(arguments: argparse.Namespace) -> int:
    table = Table.read(arguments.load) if arguments.load else run.compile_regions(arguments.configs)
    if arguments.save:
        table.write(arguments.save)
    for path in arguments.configs:
        if table.of(path.stem):
            print(describe(table, load(path, [], {}).config, path.stem), end="\n\n")
    _print_failures(table)
    expected = read_expected()["graphs"]
    compared = {graph.config for graph in table.graphs}
    known = {key: counts for key, counts in expected.items() if key.split()[0] in compared}
    print("\n".join(differences(known, table.graphs)) or "as in the committed table")
    return 1 if table.failures else 0


def _print_failures(table: Table) -> None:
    for name, error in table.failures.items():
        print(f"{name}: does not compile: {error}")


def describe(table: Table, config: Config, name: str) -> str:
    """Every graph of a configuration, and the predicted time of a micro-batch, as Markdown."""
    predictions = list(predict(table.of(name), config))
    tokens = config.batch.micro * config.model.seq_len
    graphs = [
        [
            " ".join(prediction.graph.key.split()[1:]),
            prediction.graph.kernels,
            " + ".join(f"{n} {call}" for call, n in sorted(prediction.graph.calls.items())),
            f"{prediction.graph.bytes / 1e9:.3f}",
            f"{prediction.graph.flops / 1e12:.3f}",
            f"{prediction.kernels:.2f}",
            f"{prediction.products:.2f}",
            f"{prediction.attention:.2f}",
            " ".join(f"{runs}" for _, runs in sorted(prediction.graph.runs.items())),
        ]
        for prediction in predictions
    ]
    columns = ["graph", "kernels", "calls", "GB", "TFLOP", "kernels, ms", "products, ms"]
    columns += ["attention, ms", "runs by phase"]
    steps = _steps(predictions, tokens, name)
    return (
        f"{name}: micro-batch of {tokens:,} tokens, width {config.model.model_dim}, torch "
        f"{table.torch}\n\n{markdown_table(columns, graphs)}\n\n{steps}"
    )


def _steps(predictions: Sequence, tokens: int, name: str) -> str:
    phases = sorted({phase for p in predictions for phase in p.graph.runs})
    rows = [
        [attention, checkpointing, phase, f"{ms:.1f}", f"{tokens / ms:,.0f}"]
        for attention in ATTENTION
        for checkpointing in CHECKPOINTING
        for phase in phases
        if any(p.graph.checkpointing == checkpointing for p in predictions)  # else it failed
        if (ms := step_milliseconds(predictions, phase, attention, checkpointing))
    ]
    columns = ["attention", "checkpointing", "phase", "all graphs, ms", "thousand tokens/s"]
    return markdown_table(columns, rows)


if __name__ == "__main__":
    main()
