"""Models of the parameter-golf challenge's script (PR #1412): settings and weights in.

Settings carry the script's environment-variable names in lower case, weights its parameter names.
Those are ours too, except that the MLP of a block's p-th further execution lives inside the block
here (``blocks.L.loop_mlps.{p-1}``) and not beside it (``override_mlps.L_pP``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jepa_dist.config import ModelConfig
from jepa_dist.errors import UserError
from jepa_dist.model.gpt import GPT

_RENAMED = {"seq_len": "train_seq_len", "skip_gates": "skip_gates_enabled"}
# What the script always does; here it can be left out.
_ALWAYS_ON = {"x0_mix": True, "branch_scales": True, "unet_skips": True}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The model that the challenge's script would build from ``settings``.

    ``rope_train_seq_len`` is ignored, as it is there: the rotary rescale follows ``train_seq_len``.

    Raises:
        UserError: a setting is missing.
    """
    names = [name for name in ModelConfig.model_fields if name not in _ALWAYS_ON]
    values: dict[str, Any] = dict(_ALWAYS_ON)
    missing = []
    for name in names:
        theirs = _RENAMED.get(name, name)
        if theirs in settings:
            values[name] = settings[theirs]
        elif name != "tied_embed_init_std":  # not needed to run a trained model
            missing.append(theirs)
    if missing:
        raise UserError(f"parameter-golf settings: missing {', '.join(missing)}")
    values["embedding_dim"] = values["embedding_dim"] or values["model_dim"]
    return ModelConfig.model_validate(values)


def build(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> GPT:
    """A GPT with the challenge's weights, on the CPU in float32, every parameter trainable.

    Args:
        settings: The script's settings (lower-case names), e.g. ``num_layers``, ``train_seq_len``.
        state: Its parameters by its names.

    Raises:
        UserError: tensors missing, unknown or of the wrong shape; all of them are listed.
    """
    model = GPT(model_config(settings))
    ours = {from_reference_name(name): tensor for name, tensor in state.items()}
    expected = dict(model.named_parameters())
    problems = [
        *(f"state: {to_reference_name(n)}: missing" for n in expected if n not in ours),
        *(f"state: {to_reference_name(n)}: not in this model" for n in ours if n not in expected),
        *(
            f"state: {to_reference_name(n)}: shape {tuple(ours[n].shape)}, "
            f"expected {tuple(parameter.shape)}"
            for n, parameter in expected.items()
            if n in ours and ours[n].shape != parameter.shape
        ),
    ]
    if problems:
        raise UserError(*problems)
    for name, parameter in expected.items():
        parameter.data.copy_(ours[name])
    return model


def from_reference_name(name: str) -> str:
    """Our name of one of the script's parameters."""
    match = re.fullmatch(r"override_mlps\.(\d+)_p(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, repeat, rest = match.groups()
    return f"blocks.{layer}.loop_mlps.{int(repeat) - 1}.{rest}"


def to_reference_name(name: str) -> str:
    """The script's name of one of our parameters."""
    match = re.fullmatch(r"blocks\.(\d+)\.loop_mlps\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, index, rest = match.groups()
    return f"override_mlps.{layer}_p{int(index) + 1}.{rest}"
