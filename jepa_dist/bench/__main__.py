"""Run a benchmark: ``python -m jepa_dist.bench muon [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from jepa_dist.bench import muon
from jepa_dist.failure import told_once
from jepa_dist.launched import launched_rank

# A benchmark is a module with ``add_arguments(parser)``, ``run(arguments)``, which returns what
# belongs into the JSON, and ``table(result)``, which returns it as Markdown.
_BENCHES = {"muon": muon}


def main() -> None:
    """Run the named benchmark, print its table, write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m jepa_dist.bench", description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in _BENCHES.items():
        command = commands.add_parser(name, description=bench.__doc__)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
        bench.add_arguments(command)
    arguments = parser.parse_args()
    bench = _BENCHES[arguments.bench]
    with told_once(launched_rank()):
        result = {
            "command": f"python -m jepa_dist.bench {shlex.join(sys.argv[1:])}",
            "machine": _machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **bench.run(arguments),
        }
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    print(f"{result['command']}\n{machine}; torch {torch.__version__}\n\n{bench.table(result)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": devices or "none",
    }


if __name__ == "__main__":
    main()
