"""Import and export models of the parameter-golf challenge's script (PR #1412).

    python -m jepa_dist.interop.parameter_golf import final_model.pt --settings S.json --out DIR
    python -m jepa_dist.interop.parameter_golf export DIR --out final_model.pt

Settings are the script's environment variables in lower case, as one JSON object; ``export``
writes them next to the weights. Weights have its parameter names. This package uses the same ones,
except that the MLP of a block's p-th repetition is inside the block here
(``blocks.L.loop_mlps.{p-1}``) and outside of it there (``override_mlps.L_pP``).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from jepa_dist.config import Config, ModelConfig, check
from jepa_dist.errors import UserError
from jepa_dist.files import MIB, check_regular, read_json, write_atomically
from jepa_dist.interop.safetensors_io import (
    Description,
    check_tensors,
    find_export,
    publish,
    read_description,
    read_state,
    refuse_not_finite,
    write_export,
)
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.model.gpt import GPT
from jepa_dist.process.failure import exit_on_user_error

_RENAMED = {"seq_len": "train_seq_len", "skip_gates": "skip_gates_enabled"}
# Features that the script always has; optional here.
_ALWAYS_ON = {"x0_mix": True, "branch_scales": True, "unet_skips": True}
# Options of the script; all others are of this package only, and off in models for the script.
_THEIRS = (
    *("vocab_size", "seq_len", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult"),
    *("embedding_dim", "tie_embeddings", "tied_embed_init_std", "logit_softcap", "rope_base"),
    *("rope_dims", "qk_gain_init", "ln_scale", "xsa_last_n", "skip_gates"),
    *("parallel_residual_start", "num_loops", "loop_start", "loop_end", "untie_loop_mlps"),
)
# Added to the script's settings: the recurrence phase of the weights. Without it, a model that did
# not reach its last phase would change when it is imported again.
_PHASE = "recurrence_phase"
# Not needed to run a trained model.
_OPTIONAL = ("tied_embed_init_std",)


# ---------------------------------------------------------------------------- settings


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the challenge's script would build from ``settings``.

    ``rope_train_seq_len`` is ignored as in the script: the rotary rescale uses ``train_seq_len``.

    Raises:
        UserError: settings missing, of the wrong type, or impossible together; all of them.
    """
    names = {name: _RENAMED.get(name, name) for name in _THEIRS}
    missing = [t for n, t in names.items() if t not in settings and n not in _OPTIONAL]
    if missing:
        raise UserError(f"parameter-golf settings: missing {', '.join(missing)}")
    values = {ours: settings[theirs] for ours, theirs in names.items() if theirs in settings}
    values["embedding_dim"] = values["embedding_dim"] or values["model_dim"]
    try:
        model = _without_idle_settings(ModelConfig.model_validate({**_ALWAYS_ON, **values}))
    except ValidationError as error:
        raise UserError(*(_explain(item) for item in error.errors())) from None
    problems = check(Config(model=model))
    if problems:
        raise UserError(*(f"parameter-golf settings: {problem}" for problem in problems))
    return model


def _without_idle_settings(model: ModelConfig) -> ModelConfig:
    """Disable what has no effect in the script but is rejected here; return the same model."""
    never_parallel = model.parallel_residual_start >= model.num_layers
    idle: dict[str, Any] = {"parallel_residual_start": -1} if never_parallel else {}
    if model.num_loops == 0:
        idle["untie_loop_mlps"] = False
    return model.model_copy(update=idle)


def settings_of(model: ModelConfig) -> dict[str, Any]:
    """Return the settings with which the challenge's script builds this model.

    Raises:
        UserError: the model lacks features that the script always has; all of them.
    """
    problems = [
        f"model.{name}=false: the challenge's script always has it; only models with it can be "
        "exported to final_model.pt"
        for name in _ALWAYS_ON
        if not getattr(model, name)
    ]
    for name, off in (("qk_gain_init", None), ("logit_softcap", 0.0)):
        if getattr(model, name) == off:
            problems.append(
                f"model.{name}={off}: the challenge's script cannot switch it off; only models "
                "with it can be exported to final_model.pt"
            )
    problems += [
        f"model.{name}={getattr(model, name)}: the challenge's script lacks it; only models "
        f"with {field.default} can be exported to final_model.pt"
        for name, field in ModelConfig.model_fields.items()
        if name not in (*_THEIRS, *_ALWAYS_ON) and getattr(model, name) != field.default
    ]
    if problems:
        raise UserError(*problems)
    values = {_RENAMED.get(name, name): getattr(model, name) for name in _THEIRS}
    return values | {"embedding_dim": model.embed_width}


def _explain(item: Any) -> str:
    name = str(item["loc"][0])
    return f"parameter-golf settings: {_RENAMED.get(name, name)}={item['input']!r}: {item['msg']}"


# ---------------------------------------------------------------------------- weights


def build(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> GPT:
    """Return a GPT with the challenge's weights, on the CPU in float32, trainable.

    Args:
        settings: The script's settings (lower-case names), e.g. ``num_layers``, ``train_seq_len``.
        state: Its parameters by its names, of any floating dtype.

    Raises:
        UserError: tensors missing, unknown, or of the wrong shape or kind; all of them are listed.
    """
    model = GPT(model_config(settings))
    ours = translate(state, model, "state")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(ours[name])
    return model


def translate(state: Mapping[str, Tensor], model: GPT, source: str) -> dict[str, Tensor]:
    """Return the challenge's weights in float32 under this package's names, in model order.

    Args:
        state: Its parameters by its names, of any floating dtype.
        model: Model to load them into; its parameters may be on meta.
        source: Origin of the weights, for messages.

    Raises:
        UserError: tensors missing, unknown, or of the wrong shape or kind; all of them are listed.
    """
    expected = {
        to_reference_name(name): Signature(tuple(parameter.shape), "floating")
        for name, parameter in model.named_parameters()
    }
    found = {name: Signature(tuple(t.shape), _kind(t)) for name, t in state.items()}
    problems = mismatches(source, expected, found)
    if problems:
        raise UserError(*problems)
    # Copies: views of one storage, which a file may have, could not be written again.
    return {
        from_reference_name(name): torch.empty(state[name].shape).copy_(state[name].detach())
        for name in expected
    }


def _kind(tensor: Tensor) -> str:
    is_plain = tensor.layout == torch.strided and tensor.is_floating_point()
    return "floating" if is_plain else f"{tensor.dtype} {tensor.layout}"


def from_reference_name(name: str) -> str:
    """Return this package's name of one of the script's parameters."""
    match = re.fullmatch(r"override_mlps\.(\d+)_p(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, repeat, rest = match.groups()
    return f"blocks.{layer}.loop_mlps.{int(repeat) - 1}.{rest}"


def to_reference_name(name: str) -> str:
    """Return the script's name of one of this package's parameters."""
    match = re.fullmatch(r"blocks\.(\d+)\.loop_mlps\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, index, rest = match.groups()
    return f"override_mlps.{layer}_p{int(index) + 1}.{rest}"


# ---------------------------------------------------------------------------- files


def read_final_model(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a ``final_model.pt``, on the CPU, by the script's names.

    Reads with ``weights_only=True``, which rejects a file that would run code.

    Raises:
        UserError: unreadable, or not a file of only tensors.
    """
    try:
        check_regular(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: not a file of tensors alone, so it was not loaded ({reason}); "
            "expected what torch.save(model.state_dict()) writes"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(
            f"{path}: holds something else than named tensors; "
            "expected what torch.save(model.state_dict()) writes"
        )
    return {_plain_name(name): tensor for name, tensor in state.items()}


def _plain_name(name: str) -> str:
    """Return a parameter's name without prefixes of torch.compile and DistributedDataParallel."""
    while (plain := name.removeprefix("module.").removeprefix("_orig_mod.")) != name:
        name = plain
    return name.replace("._orig_mod.", ".")


def import_final_model(
    path: Path, settings_path: Path, out: Path, *, allow_not_finite: bool = False
) -> Path:
    """Convert ``final_model.pt`` to ``model.safetensors`` and ``model.json`` in the folder ``out``.

    The model must be run in the last recurrence phase, as in the script's final evaluation.

    Returns:
        Path of the tensor file.

    Raises:
        UserError: bad settings or weights (all problems at once), or ``out`` cannot be written.
    """
    settings = _read_settings(settings_path)
    config = Config(model=model_config(settings))
    with torch.device("meta"):
        model = GPT(config.model)
    state = translate(read_final_model(path), model, str(path))
    description = Description(
        step=None,
        phase=_phase(settings, config.model),
        weights="live",
        config=config,
        metadata={"origin": f"parameter-golf {path.name}"},
    )
    return write_export(out, state, description, allow_not_finite=allow_not_finite)


def export_final_model(source: Path, out: Path, *, allow_not_finite: bool = False) -> Path:
    """Convert an exported model to ``out`` (a ``final_model.pt``), with its settings as JSON.

    Args:
        source: Run directory, folder of an export, or .safetensors file.
        out: File to write.
        allow_not_finite: Write weights that are not finite.

    Returns:
        Path of the settings.

    Raises:
        UserError: no such export, a model that the script cannot build, or a full disk.
    """
    path = find_export(source, "live")
    description = read_description(path)
    with torch.device("meta"):
        check_tensors(path, GPT(description.config.model))
    return write_final_model(out, read_state(path), description, allow_not_finite=allow_not_finite)


def write_final_model(
    out: Path,
    tensors: Mapping[str, Tensor],
    description: Description,
    *,
    allow_not_finite: bool = False,
) -> Path:
    """Write unsharded tensors as a ``final_model.pt``, with their settings as JSON.

    Args:
        out: File to write.
        tensors: The model's, by this package's names.
        description: Description of the tensors.
        allow_not_finite: Write weights that are not finite.

    Returns:
        Path of the settings.

    Raises:
        UserError: a model that the script cannot build, or a full disk.
    """
    named = settings_of(description.config.model) | {_PHASE: description.phase}
    settings = json.dumps(named, indent=1) + "\n"
    state = {to_reference_name(name): tensor for name, tensor in tensors.items()}
    refuse_not_finite(out, state, allow_not_finite)
    beside = out.with_suffix(".json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(out, lambda partial: torch.save(state, partial))
        write_atomically(beside, settings, sync=True)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise UserError(f"{out}: cannot be written: {error}; name another --out") from None
    return beside


def _phase(settings: Mapping[str, Any], model: ModelConfig) -> int:
    """Return the recurrence phase to run the weights in: the one written by
    ``export_final_model``, else the last one, in which the script ends."""
    last = LAST_PHASE if model.num_loops else 0
    phase = settings.get(_PHASE, last)
    if type(phase) is not int or not 0 <= phase <= last:
        raise UserError(f"parameter-golf settings: {_PHASE}={phase!r:.40}: expected 0 to {last}")
    return phase


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = read_json(path, MIB)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected one JSON object of the script's settings")
    return settings


# ---------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    with exit_on_user_error(rank=0):
        if arguments.direction == "import":
            written = import_final_model(
                arguments.file,
                arguments.settings,
                arguments.out,
                allow_not_finite=arguments.not_finite,
            )
        else:
            written = export_final_model(
                arguments.source, arguments.out, allow_not_finite=arguments.not_finite
            )
        print(written)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jepa_dist.interop.parameter_golf",
        description="Import and export models of the parameter-golf challenge's script.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    incoming = directions.add_parser("import", help="final_model.pt to model.safetensors")
    incoming.add_argument("file", type=Path, help="the script's final_model.pt")
    incoming.add_argument(
        "--settings", type=Path, required=True, help="JSON object of the script's settings"
    )
    incoming.add_argument("--out", type=Path, required=True, help="folder to write")
    outgoing = directions.add_parser("export", help="model.safetensors to final_model.pt")
    outgoing.add_argument("source", type=Path, help="run directory, or an exported model")
    outgoing.add_argument("--out", type=Path, required=True, help="file to write")
    for direction in (incoming, outgoing):
        direction.add_argument(
            "--not-finite", action="store_true", help="even if weights are not finite"
        )
    return parser


if __name__ == "__main__":
    main()
