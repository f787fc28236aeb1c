"""Check a machine or cluster before a long run: print one table; exit code 1 if there is a problem.

    jepa_dist doctor                                                 this machine
    srun --ntasks-per-node=8 jepa_dist doctor                        all nodes of a SLURM job
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d \\
        --rdzv-endpoint=HOST:29500 -m jepa_dist doctor               without SLURM, on every host

Start one process per GPU, as for training. The command compares the versions of Python, torch,
CUDA, driver and NCCL, this package's code and the devices; measures clock offsets, free disk space
and the speed of a matrix product and of the links, and names slow ranks; and checks that all nodes
share one folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from jepa_dist.command_line import program
from jepa_dist.config import ParallelConfig
from jepa_dist.doctor.topology import node_name, obstacles
from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import adopt_launcher

_RENDEZVOUS_SECONDS = 120.0


def main() -> int:
    """Run all checks and print the result on rank 0; return the exit code, the same on every
    rank."""
    arguments = _arguments()
    try:
        adopt_launcher(os.environ)
    except UserError as error:
        _print_problems([f"{node_name(os.environ)}: {error}"])
        return 1
    if found := list(obstacles(os.environ, arguments.same_machine)):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _print_problems(f"{node_name(os.environ)}: {line}" for line in found)
        return 1

    from jepa_dist.doctor.run import run_checks  # imported here because importing torch is slow
    from jepa_dist.parallel.world import start_world, stop_world

    try:
        world = start_world(ParallelConfig(timeout_seconds=_RENDEZVOUS_SECONDS))
    except (UserError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        _print_problems(
            [f"{node_name(os.environ)}: {_where()} cannot join the other ranks: {first_line}"]
        )
        return 1
    problems = run_checks(world, arguments.dir, arguments.need_gib)
    if world.is_main:
        count = len(problems)
        print(f"{count} problem(s) found:" if problems else "ok: no problems found", flush=True)
        _print_problems(problems)
    stop_world()
    return 1 if problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("jepa_dist.doctor"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), help="where the runs will be (default: runs)"
    )
    parser.add_argument(
        "--need-gib",
        type=float,
        default=10.0,
        help="free space required there; a checkpoint takes up to 16 bytes per parameter "
        "(default: 10)",
    )
    parser.add_argument(
        "--same-machine",
        action="store_true",
        help='all "nodes" run on this machine (for tests), where loopback addresses are valid',
    )
    return parser.parse_args()


def _print_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr, flush=True)


def _where() -> str:
    address, port = (os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
    return f"rank {os.environ.get('RANK', '0')} (rendezvous {address}:{port})"


if __name__ == "__main__":
    sys.exit(main())
