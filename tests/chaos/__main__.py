"""Rounds of chaos: ``python -m tests.chaos --rounds 50``.

Every round injects a fault into a small run, which must end as an undisturbed one does: the same
losses, tokens, spans and weights, every step recorded once, nothing left running.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.harness import Result, Session, play


def main() -> int:
    """Run the rounds and print their results; return 1 if any failed."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it has started
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    session = Session(folder, options.patience)
    print(f"seed {options.seed}, working in {folder}", flush=True)
    results = []
    for number, name in _schedule(options):
        result = play(session, number, name, FAULTS[name], f"{options.seed}-{number}")
        results.append(result)
        print("\n".join(_report(result, options, folder)), flush=True)
        if result.outcome != "failed":
            shutil.rmtree(folder / f"round_{number}")
    totals = _totals(results)
    print("\n".join(f"{key}: {value}" for key, value in totals.items()))
    if options.json is not None:
        rounds = [result.as_json() for result in results]
        report = {"seed": options.seed, "rounds": rounds, "totals": totals}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if totals["failed"]:
        return 1
    shutil.rmtree(folder)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scenarios: " + ", ".join(FAULTS),
    )
    parser.add_argument("--rounds", type=int, help="default: every scenario once")
    parser.add_argument("--seed", type=int, default=None, help="of all choices (default: random)")
    parser.add_argument("--round", type=int, help="run only this one, e.g. one that failed")
    parser.add_argument(
        "--only",
        choices=FAULTS,
        metavar="SCENARIO",
        action="append",
        help="run only this scenario; may be given several times",
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, help="factor on all time limits, for a busy machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    return options


def _schedule(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Return number and scenario of each round: all scenarios in random order, repeated."""
    generator = random.Random(options.seed)
    chosen = sorted(options.only or FAULTS)
    count = options.round or options.rounds or len(chosen)
    names: list[str] = []
    while len(names) < count:
        names += generator.sample(chosen, len(chosen))
    rounds = list(enumerate(names[:count], 1))
    return rounds if options.round is None else rounds[-1:]


def _report(result: Result, options: argparse.Namespace, folder: Path) -> list[str]:
    happened = "; ".join(result.details)
    recoveries = ", ".join(f"{seconds:.1f}" for seconds in result.recoveries) or "-"
    lines = [
        f"round {result.number}: {result.scenario} ({happened}): {result.outcome}; "
        f"{result.redone} steps redone, recovered in {recoveries} s; took {result.seconds:.0f} s"
    ]
    if result.problem:
        lines += [f"    {line}" for line in result.problem.splitlines()]
    if result.outcome == "failed":
        only = "".join(f" --only {shlex.quote(name)}" for name in options.only or [])
        again = f"python -m tests.chaos --seed {options.seed} --round {result.number}{only}"
        lines.append(f"    its files: {folder / f'round_{result.number}'}")
        lines.append(f"    again: {again}")
    return lines


def _totals(results: Sequence[Result]) -> dict[str, int | float | None]:
    recoveries = [seconds for result in results for seconds in result.recoveries]
    outcomes = Counter(result.outcome for result in results)
    played = [result for result in results if result.outcome in ("survived", "failed")]
    return {
        "rounds": len(results),
        **{outcome: outcomes[outcome] for outcome in ("survived", "failed", "missed", "skipped")},
        "median steps redone": _median([result.redone for result in played]),
        "most steps redone": max((result.redone for result in played), default=None),
        "median seconds to recover": _median(recoveries),
        "longest to recover": round(max(recoveries), 1) if recoveries else None,
    }


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 1) if values else None


if __name__ == "__main__":
    sys.exit(main())
