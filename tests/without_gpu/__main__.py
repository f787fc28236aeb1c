"""``python -m tests.without_gpu``: make the environment, print or rewrite the table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_dist.bench.common import markdown_table
from jepa_dist.config import Config, load
from tests.without_gpu import environment, run
from tests.without_gpu.roofline import Prediction, predict, step_milliseconds
from tests.without_gpu.table import (
    ATTENTION,
    CHECKPOINTING,
    Table,
    differences,
    of_configs,
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
        ("update", "the same, and make the result the committed table"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("configs", nargs="*", type=Path, default=run.CONFIGS)
        command.add_argument("--save", type=Path, help="also write the counts to this file")
        command.add_argument(
            "--load", type=Path, help="read counts from such a file; compile nothing"
        )
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            _install(arguments.folder)
        else:
            _table(arguments)
    except (environment.UnavailableError, ValueError) as error:
        parser.exit(2, f"without_gpu: {error}\n")


def _install(folder: Path) -> None:
    python = environment.install(folder)
    if folder != environment.default_folder():
        print(f"export {environment.VARIABLE}={python}")


def _table(arguments: argparse.Namespace) -> None:
    """Print the counts and differences from the committed table, or ``update`` the table."""
    table = Table.read(arguments.load) if arguments.load else run.compile_regions(arguments.configs)
    if arguments.save:
        table.write(arguments.save)
    expected = read_expected()["graphs"]
    for path in arguments.configs:
        if table.of(path.stem):
            config = load(path, [], {}).config
            print(describe(table, config, path.stem, expected), end="\n\n")
    for name, error in table.failures.items():
        print(f"{name}: does not compile: {error}")
    changed = differences(of_configs(expected, table.graphs), table.graphs)
    if arguments.command == "table":
        print("\n".join(changed) or "as in the committed table")
        return
    write_expected(table)
    print("\n".join(["changed by more than 2 %:", *changed[:-1]]) if changed else "as before")


def describe(
    table: Table, config: Config, name: str, expected: Mapping[str, Mapping[str, int]]
) -> str:
    """Return the graphs of a configuration and the predicted time of a micro-batch, as Markdown."""
    predictions = list(predict(table.of(name), config))
    tokens = config.batch.micro * config.model.seq_len
    graphs = [
        [
            " ".join(prediction.graph.key.split()[1:]),
            prediction.graph.kernels,
            " + ".join(f"{n} {call}" for call, n in sorted(prediction.graph.calls.items())),
            f"{prediction.graph.bytes / 1e9:.3f}",
            _before(expected.get(prediction.graph.key)),
            f"{prediction.graph.flops / 1e12:.3f}",
            f"{prediction.kernels:.2f}",
            f"{prediction.products:.2f}",
            f"{prediction.attention:.2f}",
            " ".join(f"{runs}" for _, runs in sorted(prediction.graph.runs.items())),
        ]
        for prediction in predictions
    ]
    columns = [
        "graph",
        "kernels",
        "calls",
        "GB",
        "GB before",
        "TFLOP",
        "kernels, ms",
        "products, ms",
    ]
    columns += ["attention, ms", "runs by phase"]
    steps = _steps(predictions, tokens)
    return (
        f"{name}: micro-batch of {tokens:,} tokens, width {config.model.model_dim}, torch "
        f"{table.torch}\n\n{markdown_table(columns, graphs)}\n\n{steps}"
    )


def _before(counts: Mapping[str, int] | None) -> str:
    return "" if counts is None else f"{counts['bytes'] / 1e9:.3f}"


def _steps(predictions: Sequence[Prediction], tokens: int) -> str:
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
