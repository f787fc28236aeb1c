"""Feed generated and mutated files to the readers of configurations and run directories.

    python -m tests.fuzz [--examples N] [TARGET ...]

Every input must be read or refused with a UserError whose problems are single printable lines;
hypothesis shrinks the others. Exit code 1 if a target fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from hypothesis import HealthCheck, settings

from tests.fuzz.targets import TARGETS, counted


def main() -> int:
    """Run the targets; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--examples", type=int, default=10_000, metavar="N", help="per target")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}; known are {', '.join(TARGETS)}")
    failed = 0
    for name in arguments.targets or TARGETS:
        profile = settings(
            max_examples=arguments.examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        counted.clear()
        started = time.monotonic()
        try:
            profile(TARGETS[name])()
            verdict = "passed"
        except Exception:
            traceback.print_exc()
            failed, verdict = 1, "FAILED"
        outcomes = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
        print(f"{name}: {verdict}: {outcomes} in {time.monotonic() - started:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
