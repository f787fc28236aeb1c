"""Score a run in tasks of lm-evaluation-harness: ``jepa_dist lm-eval RUN --tasks NAME ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_dist.command_line import Parser, errors_in_one_line, program
from jepa_dist.errors import UserError
from jepa_dist.files import write_atomically
from jepa_dist.inference.trained import TrainedModel, load


def main(argv: Sequence[str] | None = None) -> int:
    """Print the harness's table of results; return the exit code."""
    try:
        with errors_in_one_line():
            arguments = _parse_arguments(argv)
            trained = load(arguments.path, arguments.checkpoint, arguments.ema)
            print(evaluate(trained, arguments))
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=program("jepa_dist.inference.lm_eval_command"), description=__doc__)
    add = parser.add_argument
    add("path", type=Path, help="run directory, an exported model, or a quantized artifact")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="tasks of the harness")
    add("--include", type=Path, metavar="DIR", help="folder with your own task files (YAML)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--checkpoint", type=int, metavar="STEP", help="weights after this step")
    add("--ema", action="store_true", help="the averaged weights")
    add("--json", type=Path, metavar="OUT", help="write the results to this file, too")
    return parser.parse_args(argv)


def evaluate(trained: TrainedModel, arguments: argparse.Namespace) -> str:
    """Return the harness's table of results, and write the ``--json`` file.

    Raises:
        UserError: lm-eval is not installed, or it does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from jepa_dist.inference.harness import RunLM
    except ImportError as error:
        raise UserError(
            f"jepa_dist lm-eval: needs lm-evaluation-harness ({error}); "
            "pip install 'jepa_dist[lm-eval]'"
        ) from None
    manager = TaskManager(
        include_path=None if arguments.include is None else str(arguments.include)
    )
    unknown = [name for name in arguments.tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: lm-evaluation-harness has no {', '.join(unknown)}; --include DIR adds the "
            "tasks of a folder"
        )
    results: dict[str, Any] = simple_evaluate(
        RunLM(trained), tasks=arguments.tasks, task_manager=manager, limit=arguments.limit
    )
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(results["results"], indent=1) + "\n")
    return str(make_table(results))


if __name__ == "__main__":
    sys.exit(main())
