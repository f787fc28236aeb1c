"""Write the weights of a run in a format for other programs: ``jepa_dist export RUN OUT``.

OUT is a folder. Files written with the weights describe them.

    safetensors      model.safetensors (ema.safetensors with --ema), model.json
    torch            model.pt (ema.pt), a state dict for torch.load(weights_only=True), model.json
    parameter_golf   final_model.pt and final_model.json, as named by the challenge's script
    hf               a folder for the transformers library: AutoModelForCausalLM and AutoTokenizer
                     load it with trust_remote_code=True
    artifact         model.jepaq (ema.jepaq): one small file of quantized weights. Needs the
                     training data, from which sequences for the calibration are taken. Also under
                     torchrun. KEY=VALUE sets quantization.*, data.train, batch.micro or parallel.*
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jepa_dist.command_line import Parser, program
from jepa_dist.errors import UserError
from jepa_dist.files import write_atomically
from jepa_dist.inference.artifact_export import export_artifact, plan_artifact
from jepa_dist.inference.hf_export import export_hf
from jepa_dist.inference.stored import Stored, find_stored, read_stored
from jepa_dist.interop.hf.export_folder import Options
from jepa_dist.interop.parameter_golf import write_final_model
from jepa_dist.interop.safetensors_io import Weights, publish, refuse_not_finite, write_export
from jepa_dist.parallel.world import start_world, stop_world
from jepa_dist.process.dist_env import (
    adopt_launcher,
    check_rendezvous,
    die_with_launcher,
    is_launched,
    launched_rank,
    ranks_on_this_host,
)
from jepa_dist.process.failure import exit_on_host_error, exit_on_rank_error, exit_on_user_error
from jepa_dist.process.variables import set_defaults


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the name of the weights' file; return the exit code."""
    with exit_on_host_error():
        arguments = _parse_arguments(argv)
        if arguments.format == "artifact":
            adopt_launcher(os.environ)
            die_with_launcher()
            set_defaults(ranks_on_this_host())
            check_rendezvous(os.environ)
        elif is_launched():
            raise UserError(
                f"--format {arguments.format}: one process writes the files; start the command "
                "without torchrun"
            )
    rank = launched_rank()
    with exit_on_user_error(rank):
        weights: Weights = "ema" if arguments.ema else "live"
        find = find_stored if arguments.format == "hf" else read_stored
        stored = find(arguments.run, arguments.checkpoint, weights)
        if rank == 0:
            for note in stored.notes:
                print(note, file=sys.stderr)
        if arguments.format != "artifact":
            print(_FORMATS[arguments.format](stored, arguments))
            return 0
        plan = plan_artifact(stored, arguments.overrides)
    with exit_on_rank_error(rank):
        world = start_world(plan.config.parallel)
        line = export_artifact(plan, arguments.out, world)
        if world.is_main:
            print(line)
    stop_world()
    return 0


def _write_safetensors(stored: Stored, arguments: argparse.Namespace) -> Path:
    return write_export(
        arguments.out,
        stored.tensors,
        stored.description,
        allow_not_finite=arguments.not_finite,
    )


def _write_torch(stored: Stored, arguments: argparse.Namespace) -> Path:
    out: Path = arguments.out
    path = out / ("ema.pt" if stored.description.weights == "ema" else "model.pt")
    refuse_not_finite(path, stored.tensors, arguments.not_finite)
    description = stored.description.model_dump_json(by_alias=True, indent=1) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        publish(path, lambda partial: torch.save(dict(stored.tensors), partial))
        write_atomically(path.with_suffix(".json"), description, sync=True)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise UserError(f"{path}: cannot be written: {error}; name another folder") from None
    return path


def _write_parameter_golf(stored: Stored, arguments: argparse.Namespace) -> Path:
    path: Path = arguments.out / "final_model.pt"
    write_final_model(
        path, stored.tensors, stored.description, allow_not_finite=arguments.not_finite
    )
    return path


def _write_hf(stored: Stored, arguments: argparse.Namespace) -> Path:
    options = Options(
        dtype=_DTYPES[arguments.dtype],
        shard_bytes=arguments.max_shard_size,
        allow_not_finite=arguments.not_finite,
    )
    return export_hf(stored, arguments.run, arguments.out, options)


_SHARD_BYTES = 4 * 10**9
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_FORMATS: dict[str, Callable[[Stored, argparse.Namespace], Path]] = {
    "hf": _write_hf,
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "parameter_golf": _write_parameter_golf,
}


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=program("jepa_dist.inference.export"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, exported model, or one checkpoint")
    add("out", type=Path, metavar="OUT", help="folder to write into; created if missing")
    add(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="artifact: e.g. quantization.matrix_bits=5",
    )
    add(
        "--format",
        choices=(*_FORMATS, "artifact"),
        default="safetensors",
        help="default: safetensors",
    )
    add("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    add("--checkpoint", type=int, metavar="STEP", help="weights of this step (default: the newest)")
    add("--not-finite", action="store_true", help="even if weights are not finite")
    add(
        "--calibration-sequences",
        type=int,
        metavar="N",
        help="artifact: training sequences for the calibration (default: as configured)",
    )
    add("--dtype", choices=_DTYPES, help="hf: dtype of the weights (default: float32)")
    add(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="hf: maximum size of a file, such as 500MB or 4GB (default: 4GB)",
    )
    arguments = parser.parse_intermixed_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Raise for options without effect, and fill in defaults.

    Raises:
        UserError: an option of another format.
    """
    for_hf = {"--dtype": arguments.dtype, "--max-shard-size": arguments.max_shard_size}
    given = [option for option, value in for_hf.items() if value is not None]
    if given and arguments.format != "hf":
        raise UserError(f"{given[0]}: has an effect only with --format hf")
    arguments.dtype = arguments.dtype or "float32"
    arguments.max_shard_size = arguments.max_shard_size or _SHARD_BYTES
    if arguments.calibration_sequences is not None:
        key = "quantization.calibration_sequences"
        arguments.overrides.append(f"{key}={arguments.calibration_sequences}")
    if arguments.overrides and arguments.format != "artifact":
        raise UserError(f"{arguments.overrides[0]}: has an effect only with --format artifact")
    if arguments.not_finite and arguments.format == "artifact":
        raise UserError("--not-finite: weights that are not finite cannot be quantized")


def _size(text: str) -> int:
    """Return the number of bytes of ``500MB`` or ``4GB``."""
    match = re.fullmatch(r"([0-9]{1,6})([KMG]B)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 4GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


if __name__ == "__main__":
    sys.exit(main())
