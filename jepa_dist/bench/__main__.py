"""Run a benchmark: ``python -m jepa_dist.bench muon [--json FILE]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from pathlib import Path

from jepa_dist.bench.common import machine, versions
from jepa_dist.command_line import program
from jepa_dist.process.dist_env import adopt_launcher, launched_rank, ranks_on_this_host
from jepa_dist.process.failure import EXIT_FAILURE, exit_on_host_error, exit_on_user_error
from jepa_dist.process.variables import set_defaults

# A benchmark is a module of this package with ``add_arguments(parser)``, ``run(arguments)``, which
# returns the contents of the JSON file, and ``table(result)``, which returns them as Markdown.
# Lines under ``off`` in the result are problems with the machine.
_BENCHES = {
    "comm": "comm",
    "data": "data",
    "gpu": "gpu",
    "head": "head_loss",
    "host": "host_time",
    "jepa": "jepa",
    "monitor": "monitor",
    "muon": "muon_routes",
    "scale": "scale",
    "step": "step_floor",
}


def main() -> None:
    """Run the named benchmark, print its table, write its JSON (rank 0, if there are several)."""
    with exit_on_host_error():
        adopt_launcher(os.environ)
        set_defaults(ranks_on_this_host())
    parser = argparse.ArgumentParser(prog=program("jepa_dist.bench"), description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    benches = {
        name: importlib.import_module(f"jepa_dist.bench.{module}")
        for name, module in _BENCHES.items()
    }
    for name, bench in benches.items():
        command = commands.add_parser(
            name, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
        bench.add_arguments(command)
    arguments = parser.parse_args()
    bench = benches[arguments.bench]
    rank = launched_rank()
    with exit_on_user_error(rank):
        result = {
            "command": f"python -m jepa_dist.bench {shlex.join(sys.argv[1:])}",
            "machine": machine(),
            "versions": versions(),
            **bench.run(arguments),
        }
    if rank != 0:
        return
    where = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    what = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    print(f"{result['command']}\n{where}\n{what}\n\n{bench.table(result)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in result.get("off", []):
        print(f"problem: {line}", file=sys.stderr)
    if result.get("off"):
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    main()
