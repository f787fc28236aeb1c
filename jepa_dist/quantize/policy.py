"""Storage of each tensor of a model: integers of some bits and range, or float16 (golden README
section 7)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jepa_dist.config import ModelConfig, QuantizationConfig
from jepa_dist.interop.parameter_golf import to_reference_name
from jepa_dist.model.execution import looped_blocks

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OVERRIDE = re.compile(r"override_mlps\.(\d+)_p\d+\.")
_EMBEDDING = "tok_emb.weight"

_LAST_EARLY = 2
_MID = (3, 6, 7)
_FIRST_LATE = 8


@dataclass(frozen=True)
class Precision:
    """Bits and range of a quantized matrix."""

    bits: int
    clip_sigmas: float
    """Half the range of a row, in standard deviations of the row."""


def precisions(
    sizes: Mapping[str, int], model: ModelConfig, settings: QuantizationConfig
) -> dict[str, Precision]:
    """Return the precision of every tensor that is quantized, by name; all others are float16.

    Args:
        sizes: Number of elements of every tensor, by parameter name.
        model: The model; its looped blocks may have a separate precision.
        settings: Bits, ranges and the size from which tensors are quantized.
    """
    looped = looped_blocks(model)
    return {
        name: _precision(to_reference_name(name), looped, settings)
        for name, size in sizes.items()
        if size > settings.float16_elements
    }


def _precision(name: str, looped: Iterable[int], settings: QuantizationConfig) -> Precision:
    """Return the precision by the reference's name, which distinguishes MLPs of repeats."""
    if name == _EMBEDDING:
        return Precision(settings.embed_bits, settings.embed_clip_sigmas)
    override, block = _OVERRIDE.match(name), _BLOCK.match(name)
    is_looped = override is not None or (block is not None and int(block[1]) in looped)
    bits, clip_sigmas = settings.matrix_bits, settings.matrix_clip_sigmas
    if is_looped and settings.loop_layer_bits:
        bits = settings.loop_layer_bits
        clip_sigmas = settings.loop_layer_clip_sigmas or clip_sigmas
    return Precision(bits, clip_sigmas * _factor(block, is_looped, settings))


def _factor(block: re.Match[str] | None, is_looped: bool, settings: QuantizationConfig) -> float:
    """Return the factor on the range by the block's index; early blocks take precedence."""
    if block is None:
        return 1.0
    index = int(block[1])
    if index <= _LAST_EARLY:
        return settings.clip_mult_early
    if is_looped:
        return settings.clip_mult_loop
    if index in _MID:
        return settings.clip_mult_mid
    return settings.clip_mult_late if index >= _FIRST_LATE else 1.0
