"""List, verify, compare, export and prune the checkpoints of a run, in one process.

python -m jepa_dist.checkpoint ls|verify|diff|export|prune RUN ...

RUN is a run directory or the path of one checkpoint. Where one checkpoint is needed, a run
directory stands for its newest intact one. Exit code 1: ``verify`` found damage, or ``diff``
differences.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_dist.checkpoint import folder as folders
from jepa_dist.checkpoint.extract import read_model
from jepa_dist.checkpoint.manifest import (
    STATE,
    Manifest,
    TensorEntry,
    read_manifest,
    read_state,
    verify,
)
from jepa_dist.checkpoint.retention import RetentionPolicy, superseded_steps
from jepa_dist.checkpoint.shard_file import ShardFiles, assemble
from jepa_dist.command_line import program
from jepa_dist.config import flatten
from jepa_dist.errors import UserError, one_line
from jepa_dist.interop.safetensors_io import Weights, write_export
from jepa_dist.process.failure import exit_on_user_error

CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit with code 2 on any problem the user can fix."""
    arguments = _parse_arguments(argv)
    with exit_on_user_error(rank=0):
        code = arguments.command(arguments)
    sys.exit(code)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("jepa_dist.checkpoint"),
        description="List, verify, compare, export and prune the checkpoints of a run.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = "checkpoint, or run directory for its newest"

    listing = commands.add_parser("ls", help="all checkpoints; reads every file to verify it")
    listing.add_argument("run", type=Path, help="run directory")
    listing.set_defaults(command=list_checkpoints)

    verifying = commands.add_parser("verify", help="list all damage")
    verifying.add_argument("run", type=Path, help="run directory for all, or one checkpoint")
    verifying.set_defaults(command=verify_checkpoints)

    comparing = commands.add_parser("diff", help="configurations, tensors, norms of differences")
    comparing.add_argument("first", type=Path, help=one)
    comparing.add_argument("second", type=Path, help=one)
    comparing.set_defaults(command=compare)

    exporting = commands.add_parser("export", help="the model as one model.safetensors")
    exporting.add_argument("run", type=Path, help=one)
    exporting.add_argument("out", type=Path, help="folder to write into")
    exporting.add_argument("--ema", action="store_true", help="the averaged weights")
    exporting.add_argument(
        "--not-finite", action="store_true", help="even if weights are not finite"
    )
    exporting.set_defaults(command=export)

    pruning = commands.add_parser(
        "prune", help="delete all but the selected ones, and damaged or set-aside ones"
    )
    pruning.add_argument("run", type=Path, help="run directory")
    pruning.add_argument(
        "--keep-last", type=int, required=True, metavar="K", help="keep the newest K"
    )
    pruning.add_argument(
        "--keep-every", type=int, default=0, metavar="N", help="keep multiples of N steps, too"
    )
    pruning.add_argument("--dry-run", action="store_true", help="print, delete nothing")
    pruning.set_defaults(command=prune)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- commands


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """Print one line per checkpoint, oldest first."""
    print(f"{'step':>10} {'size':>10} {'age':>8} {'ranks':>6} {'health':>9}  verified")
    for path in _all_of(arguments.run):
        problems = verify(path)
        try:
            print(
                _described(read_manifest(path)),
                "no: " + one_line(problems[0]) if problems else "yes",
            )
        except UserError:
            print(f"{folders.step_of(path):>10} {'?':>10} {'?':>8} {'?':>6} {'?':>9}", end="")
            print(f"  no: {one_line(problems[0])}")
    for path in folders.all_set_aside(_folder_of(arguments.run)):
        print(f"{path.name}: set aside, no longer loaded; prune deletes it")
    return 0


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """Print all damage; return 1 if there is any."""
    single = _is_checkpoint(arguments.run)
    code = 0
    for path in [arguments.run] if single else _all_of(arguments.run):
        problems = verify(path)
        for problem in problems:
            print(one_line(problem))
        if not problems:
            print(f"{path}: intact")
        code |= bool(problems)
    return code


def compare(arguments: argparse.Namespace) -> int:
    """Print the differences in configuration and tensors; return 1 if there are any."""
    first, second = _one(arguments.first), _one(arguments.second)
    print(f"- {first}\n+ {second}")
    differences = [*_differences_of_state(first, second), *_differences_of_tensors(first, second)]
    for difference in differences:
        print(one_line(difference))
    if not differences:
        print("no difference")
    return int(bool(differences))


def export(arguments: argparse.Namespace) -> int:
    """Write the model as one safetensors file, with its description."""
    weights: Weights = "ema" if arguments.ema else "live"
    description, tensors = read_model(_one(arguments.run), weights)
    allow = arguments.not_finite
    print(write_export(arguments.out, tensors, description, allow_not_finite=allow))
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Delete checkpoints, or print which would be deleted.

    Raises:
        UserError: no checkpoint is intact; nothing is deleted.
    """
    try:
        keep = RetentionPolicy(arguments.keep_last, arguments.keep_every)
    except ValueError as error:
        raise UserError(f"--keep-last, --keep-every: {error}") from None
    folder = _folder_of(arguments.run)
    _all_of(arguments.run)
    paths = folders.published(folder)
    intact = {step: read_manifest(path) for step, path in paths.items() if not verify(path)}
    if not intact:
        raise UserError(f"{folder}: no checkpoint is intact; nothing is deleted")
    superseded = superseded_steps({step: each.healthy for step, each in intact.items()}, keep)
    damaged = [step for step in paths if step not in intact]
    unwanted = [*(paths[step] for step in [*superseded, *damaged]), *folders.all_set_aside(folder)]
    for path in unwanted:
        if not arguments.dry_run:
            with folders.writing(path):
                folders.remove(path)
        print(f"{'would delete' if arguments.dry_run else 'deleted'} {path}")
    return 0


# ---------------------------------------------------------------------------- finding


def _folder_of(run: Path) -> Path:
    return run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run


def _all_of(run: Path) -> list[Path]:
    found = list(folders.published(_folder_of(run)).values())
    if not found:
        raise UserError(f"{run}: holds no checkpoints; expected a run directory that has some")
    return found


def _is_checkpoint(path: Path) -> bool:
    return folders.step_of(path) is not None


def _one(path: Path) -> Path:
    """Return one intact checkpoint: this one, or the newest intact one of a run."""
    if _is_checkpoint(path):
        problems = verify(path)
        if problems:
            raise UserError(*problems)
        return path
    for candidate in reversed(_all_of(path)):
        problems = verify(candidate)
        if not problems:
            return candidate
        reason = one_line(problems[0])
        print(f"{candidate}: skipped, damaged or incomplete: {reason}", file=sys.stderr)
    raise UserError(
        f"{path}: no checkpoint is intact; python -m jepa_dist.checkpoint verify {path}"
    )


# ---------------------------------------------------------------------------- printing


def _described(manifest: Manifest) -> str:
    return (
        f"{manifest.step:>10} {_size(manifest.bytes):>10} "
        f"{_age(time.time() - manifest.saved_at):>8} {manifest.world_size:>6} "
        f"{'healthy' if manifest.healthy else 'UNHEALTHY':>9} "
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _differences_of_state(first: Path, second: Path) -> Iterator[str]:
    """Yield differences in step, world size, configuration and data."""
    one, other = read_manifest(first), read_manifest(second)
    for name in ("step", "world_size", "healthy", "data_fingerprint"):
        if getattr(one, name) != getattr(other, name):
            yield f"{name}: {getattr(one, name)} -> {getattr(other, name)}"
    before, after = (dict(flatten(_config_of(path))) for path in (first, second))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"config {key}: {before.get(key)!s:.200} -> {after.get(key)!s:.200}"


def _config_of(path: Path) -> Mapping[str, Any]:
    """Return the configuration in a checkpoint's state; empty if it has none."""
    config = read_state(path).get("config")
    if not isinstance(config, dict | None):
        raise UserError(f"{path / STATE}: config: expected a mapping of sections")
    return config or {}


def _differences_of_tensors(first: Path, second: Path) -> Iterator[str]:
    """Yield differences in names, shapes and dtypes; where these agree, norms of differences."""
    one, other = read_manifest(first).tensors, read_manifest(second).tensors
    with ShardFiles(first) as files, ShardFiles(second) as other_files:
        for name in sorted(one.keys() | other.keys()):
            if name not in other or name not in one:
                yield f"{name}: only in {first if name in one else second}"
            elif _kind(one[name]) != _kind(other[name]):
                yield f"{name}: {_kind(one[name])} -> {_kind(other[name])}"
            else:
                before = assemble(files, name, one[name])
                after = assemble(other_files, name, other[name])
                yield from _difference_of_values(name, before, after)


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _difference_of_values(name: str, before: Tensor, after: Tensor) -> Iterator[str]:
    """Yield one line if the values differ (NaN equals NaN)."""
    before, after = before.double(), after.double()
    if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
        norm = before.norm().item()
        difference = (after - before).norm().item()
        yield f"{name}: |difference| {difference:.4g} at |first| {norm:.4g}"


if __name__ == "__main__":
    main()
