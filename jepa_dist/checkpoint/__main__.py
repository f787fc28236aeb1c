"""Look after the checkpoints of a run, in one process.

python -m jepa_dist.checkpoint ls|verify|diff|export|prune RUN ...

RUN is a run directory, or where one checkpoint is meant the path of that one; a run directory
stands for its newest whole checkpoint. Exit code 1: ``verify`` found damage, ``diff`` differences.
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
from jepa_dist.checkpoint.retention import Keep, expendable
from jepa_dist.checkpoint.shards import ShardFiles, assemble
from jepa_dist.command_line import program
from jepa_dist.config import flatten
from jepa_dist.errors import UserError, one_line
from jepa_dist.failure import told_once
from jepa_dist.interop.safetensors_io import Weights, write_export

CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; problems that the user can mend end it with exit code 2."""
    arguments = _parse_arguments(argv)
    with told_once(rank=0):
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

    verifying = commands.add_parser("verify", help="everything that is wrong with them")
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
        "prune", help="delete what is not to be kept, damaged ones and those set aside"
    )
    pruning.add_argument("run", type=Path, help="run directory")
    pruning.add_argument("--keep-last", type=int, required=True, metavar="K", help="newest so many")
    pruning.add_argument(
        "--keep-every", type=int, default=0, metavar="N", help="and steps that are multiples of N"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")
    pruning.set_defaults(command=prune)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- commands


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """One line per checkpoint, oldest first."""
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
        print(f"{path.name}: set aside, not loaded any more; prune deletes it")
    return 0


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """Everything that is wrong; exit code 1 if anything is."""
    single = _is_checkpoint(arguments.run)
    code = 0
    for path in [arguments.run] if single else _all_of(arguments.run):
        problems = verify(path)
        for problem in problems:
            print(one_line(problem))
        if not problems:
            print(f"{path}: whole")
        code |= bool(problems)
    return code


def compare(arguments: argparse.Namespace) -> int:
    """What differs; exit code 1 if anything of configuration or tensors does."""
    first, second = _one(arguments.first), _one(arguments.second)
    print(f"- {first}\n+ {second}")
    differences = [*_differences_of_state(first, second), *_differences_of_tensors(first, second)]
    for difference in differences:
        print(one_line(difference))
    if not differences:
        print("no difference")
    return int(bool(differences))


def export(arguments: argparse.Namespace) -> int:
    """One safetensors file and its description."""
    weights: Weights = "ema" if arguments.ema else "live"
    description, tensors = read_model(_one(arguments.run), weights)
    allow = arguments.not_finite
    print(write_export(arguments.out, tensors, description, allow_not_finite=allow))
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Delete, or say what would be deleted. Without a whole checkpoint nothing goes."""
    try:
        keep = Keep(arguments.keep_last, arguments.keep_every)
    except ValueError as error:
        raise UserError(f"--keep-last, --keep-every: {error}") from None
    folder = _folder_of(arguments.run)
    _all_of(arguments.run)
    paths = folders.published(folder)
    whole = {step: read_manifest(path) for step, path in paths.items() if not verify(path)}
    if not whole:
        raise UserError(f"{folder}: no checkpoint is whole; nothing is deleted")
    unkept = expendable({step: manifest.healthy for step, manifest in whole.items()}, keep)
    damaged = [step for step in paths if step not in whole]
    doomed = [*(paths[step] for step in [*unkept, *damaged]), *folders.all_set_aside(folder)]
    for path in doomed:
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
    """One whole checkpoint: this one, or the newest whole one of a run."""
    if _is_checkpoint(path):
        problems = verify(path)
        if problems:
            raise UserError(*problems)
        return path
    for candidate in reversed(_all_of(path)):
        problems = verify(candidate)
        if not problems:
            return candidate
        print(f"{candidate}: skipped, it is not whole: {one_line(problems[0])}", file=sys.stderr)
    raise UserError(f"{path}: no checkpoint is whole; python -m jepa_dist.checkpoint verify {path}")


# ---------------------------------------------------------------------------- telling


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
    """Of step, world size, configuration and data."""
    one, other = read_manifest(first), read_manifest(second)
    for name in ("step", "world_size", "healthy", "data_fingerprint"):
        if getattr(one, name) != getattr(other, name):
            yield f"{name}: {getattr(one, name)} -> {getattr(other, name)}"
    before, after = (dict(flatten(_config_of(path))) for path in (first, second))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"config {key}: {before.get(key)!s:.200} -> {after.get(key)!s:.200}"


def _config_of(path: Path) -> Mapping[str, Any]:
    """The configuration in a checkpoint's state; nothing where it has none."""
    config = read_state(path).get("config")
    if not isinstance(config, dict | None):
        raise UserError(f"{path / STATE}: config: expected a mapping of sections")
    return config or {}


def _differences_of_tensors(first: Path, second: Path) -> Iterator[str]:
    """Names, shapes and dtypes; where these agree, norms of the differences."""
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
    """Nothing if they are equal (NaN equals NaN)."""
    before, after = before.double(), after.double()
    if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
        norm = before.norm().item()
        difference = (after - before).norm().item()
        yield f"{name}: |difference| {difference:.4g} at |first| {norm:.4g}"


if __name__ == "__main__":
    main()
