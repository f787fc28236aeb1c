"""Train the arms and seeds of one YAML file, and compare them in pairs.

    jepa_dist sweep list FILE              check the file and print one line per member
    jepa_dist sweep run FILE [--dry-run]   train every member here, or resume the sweep
    jepa_dist sweep run FILE --jobs N      train N members at a time
    jepa_dist sweep run FILE --until-decided [--max-pairs N]
                                           then add seeds until every arm has a verdict
    jepa_dist sweep evaluate FILE          evaluate finished members in the file's tasks
    jepa_dist sweep results FILE [--quantized] [--plot OUT.png]
                                           print (and draw) the differences to the control
    jepa_dist sweep member FILE INDEX      print one member's arguments for jepa_dist train

FILE is a YAML file, or the name of a shipped one (jepa_debug, study, ...). Every command accepts
KEY=VALUE at the end, applied to all members (data.train=..., train.steps=...); run.dir is the
folder of the members' run directories. Relative paths are relative to the working directory (with
python launch/sweep.py, to the root of the checkout). On SLURM: slurm/jepa_sweep.sh. The format of
FILE: docs/sweeps.md.

    NPROC_PER_NODE=N   ranks of a member (default: the number of GPUs, or 2 without any; with
                       --jobs their share of it)
    OMP_NUM_THREADS=N  threads per rank (default: cores / ranks of all members that are trained)
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_dist.command_line import end_with_reader, program
from jepa_dist.errors import UserError
from jepa_dist.sweep.members import (
    Member,
    add_seed,
    read_margins,
    read_plan,
    read_sweep,
    read_widths,
)
from jepa_dist.sweep.results import Results, read_results
from jepa_dist.sweep.running import evaluate_all, evaluate_commands, train_all, train_commands
from jepa_dist.sweep.verdicts import describe, undecided_arms


def main() -> int:
    """Run a subcommand; return the exit code."""
    with end_with_reader():
        return _main()


def _main() -> int:
    arguments = _arguments()
    try:
        members = read_sweep(arguments.file, arguments.overrides)
        if arguments.command == "list":
            print(*map(_line, members), sep="\n")
        elif arguments.command == "member":
            print(*_pick(members, arguments.index).arguments, sep="\n")
        elif arguments.command == "results":
            widths = read_widths(arguments.file) if arguments.quantized else []
            results = read_results(members, read_margins(arguments.file), widths)
            print(*describe(results), sep="\n")
            if arguments.plot is not None:
                _plot(results, arguments.plot)
        elif arguments.command == "evaluate":
            return _evaluate(members, arguments)
        else:
            return _run(members, arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments() -> argparse.Namespace:
    """Parse the command line; options may appear anywhere."""
    parser = argparse.ArgumentParser(
        prog=program("jepa_dist.sweep"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("list", "run", "evaluate", "results", "member"))
    parser.add_argument("file", type=Path, metavar="FILE", help="e.g. jepa_debug")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all members")
    parser.add_argument("--dry-run", action="store_true", help="run: print the commands only")
    parser.add_argument(
        "--jobs", type=_jobs, default=1, metavar="N", help="run, evaluate: members at a time"
    )
    parser.add_argument("--quantized", action="store_true", help="results: after quantization, too")
    parser.add_argument(
        "--until-decided", action="store_true", help="run: add seeds until every arm is decided"
    )
    parser.add_argument(
        "--max-pairs", type=int, default=40, metavar="N", help="but not beyond N seeds (default 40)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="results: also draw the differences (.png, .svg)"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.command == "member":
        index, *arguments.overrides = arguments.overrides or [""]
        if not index.isdecimal():
            parser.error("member: expected FILE INDEX, with an INDEX of 0, 1, ... as listed")
        arguments.index = int(index)
    return arguments


def _jobs(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of members, 1 or more")
    return int(text)


def _line(member: Member) -> str:
    return f"{member.index}  {shlex.join(member.arguments)}"


def _pick(members: Sequence[Member], index: int) -> Member:
    if index >= len(members):
        raise UserError(f"INDEX={index}: this sweep's members are 0..{len(members) - 1}")
    return members[index]


def _plot(results: Results, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--plot: matplotlib (the extra [report]) is not installed; fix: "
            "python -m pip install 'matplotlib>=3.8' -c constraints.txt"
        )
    from jepa_dist.sweep.plot import write_plot

    write_plot(results, path)
    print(f"written: {path}")


# ---------------------------------------------------------------------------- running


def _run(members: Sequence[Member], arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        print(*map(shlex.join, train_commands(members, arguments.jobs)), sep="\n")
        return 0
    if arguments.until_decided:
        return _run_until_decided(members, arguments)
    return train_all(members, read_plan(arguments.file), arguments.jobs)


def _evaluate(members: Sequence[Member], arguments: argparse.Namespace) -> int:
    plan = read_plan(arguments.file)
    if plan is None:
        raise UserError(
            "evaluate: the sweep's file has no section evaluate with tasks, probe or quantize"
        )
    if arguments.dry_run:
        for command in evaluate_commands(members, plan):
            print(shlex.join(command))
        return 0
    return evaluate_all(members, plan, arguments.jobs)


def _run_until_decided(members: Sequence[Member], arguments: argparse.Namespace) -> int:
    """Train the members, then one more seed at a time; return an exit code as ``train_all``."""
    plan, margins = read_plan(arguments.file), read_margins(arguments.file)
    code = train_all(members, plan, arguments.jobs)
    while code == 0:
        results = read_results(members, margins)
        seeds = len({member.seed for member in members})
        undecided = undecided_arms(results)
        if not undecided or seeds >= arguments.max_pairs:
            print(*describe(results), sep="\n")
            if undecided:
                print(f"not decided after {seeds} seeds: {', '.join(undecided)}")
            break
        print(f"{seeds} seeds, not decided: {', '.join(undecided)}; one more seed", flush=True)
        add_seed(members)
        trained, members = members, read_sweep(arguments.file, arguments.overrides)
        code = train_all(members[len(trained) :], plan, arguments.jobs)
    return code


if __name__ == "__main__":
    sys.exit(main())
