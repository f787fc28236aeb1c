"""Evaluate a trained model; also under torchrun.

python -m jepa_dist.evaluate RUN [--sliding --stride 64] [--ema] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from jepa_dist.command_line import Parser, program
from jepa_dist.config import Config, as_override, check_world, flatten, load, to_dict
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.shards import find_shards
from jepa_dist.errors import UserError
from jepa_dist.evaluate.score import Score, score
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.weights import Source, find_weights, load_model
from jepa_dist.evaluate.windows import Windows
from jepa_dist.failure import told_by_host, told_by_this_rank, told_once
from jepa_dist.launched import (
    adopt_launcher,
    check_rendezvous,
    die_with_launcher,
    launched_rank,
    launched_world_size,
    ranks_on_this_host,
)
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.process_env import set_defaults

# What of a run's configuration an evaluation goes by. The rest belongs to training; ranks are laid
# out anew, since the evaluation may have others than the run had.
_DATA = ("data.val", "data.tokenizer", "eval.sequences", "batch.micro")
_TAKEN = ("model.", *_DATA, "parallel.compile", "parallel.precision")
_CHANGEABLE = (*_DATA, "parallel.")

_DEFAULT_STRIDE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that can be checked, then evaluate."""
    with told_by_host():
        arguments = _parse_arguments(argv)
        adopt_launcher(os.environ)
        die_with_launcher()
        set_defaults(ranks_on_this_host())
        check_rendezvous(os.environ)
    rank = launched_rank()
    with told_once(rank):
        source = find_weights(arguments.path, "ema" if arguments.ema else "live")
        config = resolve(source.description.config, arguments.overrides)
        tokenizer = load_checked_tokenizer(config, ("val",))
        windows = find_windows(config, arguments.stride)
    with told_by_this_rank(rank):
        world = start_world(config.parallel)
        model = load_model(source, config.parallel, world)
        started = time.perf_counter()
        result = score(
            model,
            windows,
            phase=source.description.phase,
            micro=config.batch.micro,
            bytes_of=None if tokenizer is None else tokenizer.byte_counter(),
            world=world,
        )
        if world.is_main:
            print(report(source, windows, result, time.perf_counter() - started))
            if tokenizer is not None and tokenizer.note:
                print(f"note     {tokenizer.note}")
    stop_world()


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``stride`` is None unless windows are to overlap."""
    parser = Parser(
        prog=program("jepa_dist.evaluate"),
        description="Loss and bits per byte of a trained model; also under torchrun.",
    )
    parser.add_argument("path", type=Path, help="run directory, or an exported model")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. data.val='other/val_*.bin', batch.micro=64, parallel.compile=false",
    )
    parser.add_argument(
        "--sliding", action="store_true", help="overlapping windows: more context for each target"
    )
    parser.add_argument(
        "--stride",
        type=int,
        help=f"tokens from one overlapping window to the next (default {_DEFAULT_STRIDE})",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.stride is not None and not arguments.sliding:
        parser.error("--stride: only with --sliding")
    if arguments.sliding and arguments.stride is None:
        arguments.stride = _DEFAULT_STRIDE
    return arguments


def resolve(trained: Config, overrides: Sequence[str]) -> Config:
    """The configuration of an evaluation: the run's where it matters, with ``overrides``.

    Raises:
        UserError: an override that is unknown, ill-typed, or of no effect here, or a mesh that
            does not fit the ranks.
    """
    idle = [
        f"command line: {item}: has no effect on an evaluation; keys that have are "
        f"{', '.join(_DATA)} and parallel.*"
        for item in overrides
        if "=" in item and not item.strip().startswith(_CHANGEABLE)
    ]
    if idle:
        raise UserError(*idle)
    taken = [
        as_override(key, value)
        for key, value in flatten(to_dict(trained))
        if key.startswith(_TAKEN)
    ]
    world_size = launched_world_size()
    # There is no training batch here that could be too small for the ranks.
    config = load(None, [*taken, f"batch.sequences={world_size}", *overrides], {}).config
    check_world(config, world_size)
    return config


def find_windows(config: Config, stride: int | None) -> Windows:
    """What to evaluate on; windows overlap if there is a ``stride``.

    Raises:
        UserError: no shards, damaged ones, less than one window, or a stride out of range.
    """
    stream = TokenStream(find_shards(config.data.val, "data.val"), config.model.vocab_size)
    length = config.model.seq_len
    return Windows(stream, length, length if stride is None else stride, config.eval.sequences)


def report(source: Source, windows: Windows, result: Score, seconds: float) -> str:
    """The result as lines of name and value."""
    description = source.description
    step = "" if description.step is None else f", step {description.step}"
    lines = {
        "weights": f"{source.path} ({description.weights}{step}, phase {description.phase})",
        "windows": f"{len(windows)} of {windows.seq_len} tokens, stride {windows.stride}",
        "tokens": f"{result.num_tokens}",
        "bytes": f"{result.num_bytes}",
        "loss": f"{result.loss:.6f} nats per token",
        "bpb": f"{result.bits_per_byte:.6f} bits per byte",
        "time": f"{seconds:.1f} s",
    }
    if not result.num_bytes:  # no tokenizer, or no text
        del lines["bytes"], lines["bpb"]
    return "\n".join(f"{name:<8} {value}" for name, value in lines.items())


if __name__ == "__main__":
    main()
