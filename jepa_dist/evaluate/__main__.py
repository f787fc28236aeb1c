"""Evaluate a trained model; also under torchrun.

jepa_dist evaluate RUN [--sliding --stride 64] [--ema] [--compare OTHER] [KEY=VALUE ...]
jepa_dist evaluate RUN [--tasks FILE ...] [--probe FILE ...] [--quantize BITS ...] [--ema]
                   [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from jepa_dist.command_line import Parser, program
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.evaluate.evidence import add_options, check_evidence, is_evidence, split_options
from jepa_dist.evaluate.score import Score, add_scores, score
from jepa_dist.evaluate.settings import EVALUATION
from jepa_dist.evaluate.weights import (
    Source,
    check_comparable,
    find_weights,
    load_model,
    load_weights,
)
from jepa_dist.evaluate.windows import Windows, find_windows
from jepa_dist.interop.safetensors_io import Weights
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.process.dist_env import (
    adopt_launcher,
    check_rendezvous,
    die_with_launcher,
    launched_rank,
    ranks_on_this_host,
)
from jepa_dist.process.failure import exit_on_host_error, exit_on_rank_error, exit_on_user_error
from jepa_dist.process.variables import set_defaults

_DEFAULT_STRIDE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that can be checked, then evaluate."""
    with exit_on_host_error():
        arguments = _parse_arguments(argv)
        adopt_launcher(os.environ)
        die_with_launcher()
        set_defaults(ranks_on_this_host())
        check_rendezvous(os.environ)
    rank = launched_rank()
    with exit_on_user_error(rank):
        weights: Weights = "ema" if arguments.ema else "live"
        source = find_weights(arguments.path, weights)
        other = None if arguments.compare is None else find_weights(arguments.compare, weights)
        if other is not None:
            check_comparable(source, other)
        if is_evidence(arguments):
            evidence = check_evidence(arguments, source)
        else:
            config = EVALUATION.resolve(source.description.config, arguments.overrides)
            tokenizer = load_checked_tokenizer(config, ("val",))
            windows = find_windows(config, arguments.stride)
    if is_evidence(arguments):
        with exit_on_rank_error(rank):
            evidence.run(start_world(evidence.config.parallel))
        stop_world()
        return
    with exit_on_rank_error(rank):
        world = start_world(config.parallel)
        model = load_model(source, config.parallel, world)

        def evaluate(what: Source) -> dict[str, Score]:
            return {
                name: score(
                    model,
                    part,
                    phase=what.description.phase,
                    micro=config.batch.micro,
                    bytes_of=None if tokenizer is None else tokenizer.byte_counter(),
                    world=world,
                )
                for name, part in windows.items()
            }

        started = time.perf_counter()
        by_source = evaluate(source)
        result = add_scores(by_source.values())
        if world.is_main:
            print(report(source, windows, by_source, time.perf_counter() - started))
            if tokenizer is not None and tokenizer.note:
                print(f"note     {tokenizer.note}")
        if other is not None:
            load_weights(other, model)
            compared = add_scores(evaluate(other).values())
            if world.is_main:
                print(report_gap(other, result, compared))
    stop_world()


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; ``stride`` is None unless windows overlap."""
    parser = Parser(
        prog=program("jepa_dist.evaluate"),
        description="Loss and bits per byte of a trained model; or its accuracy in tasks and of "
        "linear probes, and what quantization costs; also under torchrun.",
    )
    parser.add_argument(
        "path", type=Path, help="run directory, an exported model, or a quantized artifact"
    )
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
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER",
        help="evaluate this run or model on the same windows, too, and print the differences: the "
        "run from which an artifact was made, for example",
    )
    add_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    split_options(parser, arguments)
    if arguments.stride is not None and not arguments.sliding:
        parser.error("--stride: only with --sliding")
    if arguments.sliding and arguments.stride is None:
        arguments.stride = _DEFAULT_STRIDE
    return arguments


def report(
    source: Source, windows: dict[str, Windows], scores: dict[str, Score], seconds: float
) -> str:
    """Return the result as lines of name and value; sources with a name have a line each."""
    result, first = add_scores(scores.values()), next(iter(windows.values()))
    count = sum(map(len, windows.values()))
    lines = {
        "weights": _describe(source),
        "windows": f"{count} of {first.seq_len} tokens, stride {first.stride}",
        "tokens": f"{result.num_tokens}",
        "bytes": f"{result.num_bytes}",
        "loss": f"{result.loss:.6f} nats per token",
        "bpb": f"{result.bits_per_byte:.6f} bits per byte",
        "time": f"{seconds:.1f} s",
    }
    if not result.num_bytes:  # no tokenizer, or no text
        del lines["bytes"], lines["bpb"]
    for name, part in scores.items():
        bits = f", {part.bits_per_byte:.6f} bits per byte" if part.num_bytes else ""
        lines |= {f"of {name}": f"{part.loss:.6f} nats per token{bits}"} if name else {}
    return _table(lines)


def report_gap(other: Source, result: Score, compared: Score) -> str:
    """Return the other model's result, and by how much the first one is worse, as lines of name
    and value."""
    gap, bits_gap = result.loss - compared.loss, result.bits_per_byte - compared.bits_per_byte
    lines = {
        "compared": _describe(other),
        "its loss": f"{compared.loss:.6f} nats per token",
        "its bpb": f"{compared.bits_per_byte:.6f} bits per byte",
        "gap": f"{gap:+.6f} nats per token, {bits_gap:+.6f} bits per byte",
    }
    if not result.num_bytes:
        del lines["its bpb"]
        lines["gap"] = f"{gap:+.6f} nats per token"
    return _table(lines)


def _describe(source: Source) -> str:
    description = source.description
    step = "" if description.step is None else f", step {description.step}"
    return f"{source.path} ({description.weights}{step}, phase {description.phase})"


def _table(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<8} {value}" for name, value in lines.items())


if __name__ == "__main__":
    main()
