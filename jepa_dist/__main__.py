"""The command ``jepa_dist``: one entry point for everything that this package does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jepa_dist import __version__
from jepa_dist.command_line import end_with_reader

_NAME = "jepa_dist"


@dataclass(frozen=True)
class _Subcommand:
    """A subcommand: a module whose ``main`` reads ``sys.argv`` and returns the exit code (None is
    0)."""

    module: str
    summary: str
    examples: tuple[str, str]
    page: str
    """File name of its documentation page below docs/."""


_SUBCOMMANDS = {
    "train": _Subcommand(
        "jepa_dist.train",
        "train a model; start it under torchrun or srun for several ranks",
        (
            "jepa_dist train debug jepa.lambda=0.1 run.dir=runs/first",
            "torchrun --rdzv-backend=loopback --nproc-per-node=gpu -m jepa_dist train gpt_36m",
        ),
        "configuration.md",
    ),
    "evaluate": _Subcommand(
        "jepa_dist.evaluate.__main__",
        "loss and bits per byte of a trained model, or its accuracy in tasks",
        (
            "jepa_dist evaluate runs/debug --sliding --ema",
            "jepa_dist evaluate runs/debug --tasks data/tasks/cloze.jsonl",
        ),
        "using.md",
    ),
    "lm-eval": _Subcommand(
        "jepa_dist.inference.lm_eval_command",
        "score a trained model in tasks of lm-evaluation-harness",
        (
            "jepa_dist lm-eval runs/debug --tasks cloze --include my_tasks",
            "jepa_dist lm-eval runs/debug --tasks hellaswag piqa --limit 100 --json results.json",
        ),
        "evaluation.md",
    ),
    "generate": _Subcommand(
        "jepa_dist.inference.__main__",
        "continue a text with a trained model",
        (
            "jepa_dist generate runs/debug --prompt 'def main('",
            "jepa_dist generate runs/debug --interactive --temperature 0.7 --top-p 0.95",
        ),
        "using.md",
    ),
    "export": _Subcommand(
        "jepa_dist.inference.export",
        "write the weights of a run in a format for other programs",
        (
            "jepa_dist export runs/debug exported",
            "jepa_dist export runs/debug exported --format torch --ema",
        ),
        "using.md",
    ),
    "tasks": _Subcommand(
        "jepa_dist.evaluate.make_tasks",
        "make likelihood tasks and labeled documents from a corpus",
        ("jepa_dist tasks debug", "jepa_dist tasks gpt_36m --out data/tasks_36m"),
        "evaluation.md",
    ),
    "prepare": _Subcommand(
        "jepa_dist.data.prepare",
        "turn text into token shards",
        (
            "jepa_dist prepare",
            "jepa_dist prepare my_folder more.jsonl --out data/mine",
        ),
        "data.md",
    ),
    "inspect": _Subcommand(
        "jepa_dist.data.inspect_shards",
        "show the documents in token shards",
        (
            "jepa_dist inspect data/stdlib/val_000000.bin",
            "jepa_dist inspect 'data/mine/*.bin' --documents 1",
        ),
        "data.md",
    ),
    "checkpoint": _Subcommand(
        "jepa_dist.checkpoint.__main__",
        "list, verify, compare, export and prune checkpoints",
        ("jepa_dist checkpoint ls runs/debug", "jepa_dist checkpoint export runs/debug exported"),
        "checkpointing.md",
    ),
    "sweep": _Subcommand(
        "jepa_dist.sweep.__main__",
        "run several settings over several seeds and compare them in pairs",
        ("jepa_dist sweep run jepa_debug", "jepa_dist sweep results jepa_debug"),
        "sweeps.md",
    ),
    "report": _Subcommand(
        "jepa_dist.report.__main__",
        "one HTML page with plots of one or several runs",
        ("jepa_dist report runs/debug", "jepa_dist report runs/one runs/two --out compared.html"),
        "monitoring.md",
    ),
    "doctor": _Subcommand(
        "jepa_dist.doctor.__main__",
        "check a machine or a cluster before a long run",
        ("jepa_dist doctor", "srun --ntasks-per-node=8 jepa_dist doctor --dir /shared/runs"),
        "slurm.md",
    ),
    "bench": _Subcommand(
        "jepa_dist.bench.__main__",
        "measure what training costs",
        ("jepa_dist bench step --config debug", "jepa_dist bench gpu --json gpu.json"),
        "performance.md",
    ),
}


def main(argv: Sequence[str] | None = None) -> int | str | None:
    """Run one subcommand; return its exit code.

    Args:
        argv: Name of the subcommand and its arguments (default: those of the process).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        with end_with_reader():
            print(_overview())
        return 0
    if name == "--version":
        print(f"{_NAME} {__version__}")
        return 0
    if name not in _SUBCOMMANDS:
        wrong = f"unknown subcommand {name!r}" if name else "no subcommand"
        expected = f"expected one of {', '.join(_SUBCOMMANDS)}; --help describes them"
        print(f"error: command line: {wrong}; {expected}", file=sys.stderr)
        return 2
    return _run(name, _SUBCOMMANDS[name], rest)


def _run(name: str, subcommand: _Subcommand, rest: list[str]) -> int | str | None:
    """Run the subcommand's ``main`` with ``sys.argv`` set to its own command line, which processes
    that it starts may read."""
    sys.argv = [f"{_NAME} {name}", *rest]
    try:
        code: int | str | None = importlib.import_module(subcommand.module).main()
    except SystemExit as leaving:
        if not leaving.code and not {"-h", "--help"}.isdisjoint(rest):
            with end_with_reader():
                print(_closing(subcommand))
        raise
    return code


def _overview() -> str:
    width = max(map(len, _SUBCOMMANDS))
    return "\n".join(
        [
            f"usage: {_NAME} [--version] SUBCOMMAND ...",
            "",
            "Train GPT language models with a JEPA objective, and use them.",
            "",
            *(f"  {name:<{width}}  {each.summary}" for name, each in _SUBCOMMANDS.items()),
            "",
            f"{_NAME} SUBCOMMAND --help shows the options and two examples.",
        ]
    )


def _closing(subcommand: _Subcommand) -> str:
    lines = ["", "examples:", *(f"  {line}" for line in subcommand.examples), ""]
    return "\n".join([*lines, f"More: docs/{subcommand.page}"])


if __name__ == "__main__":
    sys.exit(main())
