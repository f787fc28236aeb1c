"""Train the arms and seeds of one YAML file one after the other, and compare them in pairs.

    jepa_dist sweep list FILE              check the file and print one line per member
    jepa_dist sweep run FILE [--dry-run]   train every member here, or resume the sweep
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

    NPROC_PER_NODE=N   ranks (default: the number of GPUs, or 2 without any)
    OMP_NUM_THREADS=N  threads per rank (default: cores / ranks)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from jepa_dist.command_line import end_with_reader, program
from jepa_dist.errors import UserError
from jepa_dist.monitor.evaluation_file import EVALUATION, read_evaluation
from jepa_dist.sweep.members import (
    EvaluationPlan,
    Member,
    add_seed,
    read_margins,
    read_plan,
    read_sweep,
    read_widths,
)
from jepa_dist.sweep.results import Results, read_results
from jepa_dist.sweep.verdicts import describe, undecided_arms

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


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
            return _evaluate_all(members, read_plan(arguments.file), arguments.dry_run)
        elif arguments.until_decided and not arguments.dry_run:
            return _run_until_decided(members, arguments)
        else:
            return _run_all(members, dry_run=arguments.dry_run, plan=read_plan(arguments.file))
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


def _run_all(members: Sequence[Member], *, dry_run: bool, plan: EvaluationPlan | None) -> int:
    """Train and evaluate the members one after the other; finished ones exit immediately.

    Returns:
        0 if all are finished, 1 if at least one failed, 128 + n if stopped by signal n.
    """
    ranks = _num_ranks()
    commands = [_command(member, ranks) for member in members]
    if dry_run:
        print(*map(shlex.join, commands), sep="\n")
        return 0
    failed = []
    for member, command in zip(members, commands, strict=True):
        print(f"member {member.index} of {len(members)}: {member.run_dir}", flush=True)
        code, stopped_by = _run(command)
        if stopped_by is not None:
            print("stopped; the same command resumes the sweep")
            return 128 + stopped_by
        if code != 0 or _state(member) != "finished":
            failed.append(f"{member.run_dir} (exit code {code}, state {_state(member)})")
        elif plan is not None:
            code = _evaluate_all([member], plan, dry_run)
            if code > 128:
                return code
            if code:
                failed.append(f"{member.run_dir} (evaluation)")
    for name in failed:
        print(f"error: {name}: not finished; see its messages above", file=sys.stderr)
    return 1 if failed else 0


def _evaluate_all(members: Sequence[Member], plan: EvaluationPlan | None, dry_run: bool) -> int:
    """Evaluate the finished members whose ``evaluation.json`` is missing or out of date.

    Returns:
        0 if all could be evaluated, 1 if at least one failed, 128 + n if stopped by signal n.

    Raises:
        UserError: the sweep has nothing to evaluate.
    """
    if plan is None:
        raise UserError(
            "evaluate: the sweep's file has no section evaluate with tasks, probe or quantize"
        )
    failed = False
    for member in members:
        settings = member.resolve().quantization
        if _state(member) != "finished" or _is_evaluated(member, plan.inputs(settings)):
            continue
        arguments = plan.arguments(member.run_dir, settings)
        command = [sys.executable, "-m", "jepa_dist.evaluate", *arguments]
        if dry_run:
            print(shlex.join(command))
            continue
        print(f"evaluating {member.run_dir}", flush=True)
        code, stopped_by = _run(command)
        if stopped_by is not None:
            print("stopped; the same command resumes the sweep")
            return 128 + stopped_by
        failed |= code != 0
    return int(failed)


def _is_evaluated(member: Member, expected: Mapping[str, str]) -> bool:
    """Return whether a finished member's ``evaluation.json`` is that of its final weights."""
    try:
        evaluation = read_evaluation(member.run_dir / EVALUATION)
        step = json.loads((member.run_dir / "status.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False
    return evaluation is not None and evaluation.step == step and evaluation.inputs() == expected


def _run_until_decided(members: Sequence[Member], arguments: argparse.Namespace) -> int:
    """Train the members, then one more seed at a time; return an exit code as ``_run_all``."""
    plan, margins = read_plan(arguments.file), read_margins(arguments.file)
    code = _run_all(members, dry_run=False, plan=plan)
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
        code = _run_all(members[len(trained) :], dry_run=False, plan=plan)
    return code


def _num_ranks() -> int:
    given = os.environ.get("NPROC_PER_NODE")
    if given is None:
        import torch  # imported here because it is slow

        return torch.cuda.device_count() or 2
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"NPROC_PER_NODE={given}: expected a number of ranks")
    return int(given)


def _command(member: Member, ranks: int) -> list[str]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    return [
        *("env", f"OMP_NUM_THREADS={threads}"),
        *(sys.executable, "-m", "jepa_dist.process.agent", "--rdzv-backend=loopback"),
        *(f"--nproc-per-node={ranks}", "-m", "jepa_dist.train", *member.arguments),
    ]


def _run(command: Sequence[str]) -> tuple[int, int | None]:
    """Run a command, forwarding stop signals; return the exit code, and the signal if there was
    one.

    The command gets its own session; otherwise Ctrl-C would reach torchrun twice: from the terminal
    and from here.
    """
    process = subprocess.Popen(command, start_new_session=True)
    requests: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        requests.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, requests[0] if requests else None


def _state(member: Member) -> str:
    """Return the state in the member's status.json; torchrun's exit code does not show it."""
    try:
        return str(json.loads((member.run_dir / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
