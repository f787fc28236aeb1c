"""``jepa_dist evaluate RUN --quantize BITS ...``: the cost of quantization; writes no artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from jepa_dist.config import Config, QuantizationConfig
from jepa_dist.data.sources import find_split, fingerprint_split
from jepa_dist.data.tokenizer import ByteCounter
from jepa_dist.errors import UserError
from jepa_dist.evaluate.score import Score, add_scores, score
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.weights import Source, load_model, load_weights
from jepa_dist.evaluate.windows import Windows, find_windows
from jepa_dist.interop.tensor_file import LazyTensors
from jepa_dist.model.gpt import GPT
from jepa_dist.monitor.evaluation_file import QuantizedResult
from jepa_dist.parallel.world import World
from jepa_dist.quantize.artifact import Artifact
from jepa_dist.quantize.policy import precisions
from jepa_dist.quantize.quantized_model import quantize_model


@dataclass(frozen=True)
class QuantizationPlan:
    """A checked evaluation of quantization."""

    widths: tuple[QuantizationConfig, ...]
    """Settings of each width, in the requested order."""
    matrices: int
    """Number of matrices that are quantized."""
    tokens: npt.NDArray[np.int64]
    """Calibration sequences, [sequences, T]."""
    windows: Mapping[str, Windows]
    """The validation set, by source."""
    validated_on: str
    """Identifies the validation set, as ``val/set`` in metrics.jsonl."""


def plan_quantization(bits: Sequence[int], config: Config) -> QuantizationPlan:
    """Read the data, and check that something is quantized.

    Args:
        bits: Values of ``quantization.matrix_bits`` to evaluate.
        config: The model, its data, and all other settings of the quantization.

    Raises:
        UserError: no data, or no tensor is large enough to be quantized.
    """
    settings = config.quantization
    with torch.device("meta"):
        sizes = {name: tensor.numel() for name, tensor in GPT(config.model).named_parameters()}
    matrices = len(precisions(sizes, config.model, settings))
    if not matrices:
        raise UserError(
            f"--quantize: quantization.float16_elements={settings.float16_elements}: no tensor of "
            f"this model has more elements (the largest: {max(sizes.values())}), so none is "
            "quantized; set it lower, e.g. quantization.float16_elements=1000"
        )
    return QuantizationPlan(
        widths=tuple(settings.with_bits(each) for each in dict.fromkeys(bits)),
        matrices=matrices,
        tokens=read_calibration(config),
        windows=find_windows(config, None),
        validated_on=f"{fingerprint_split(config, 'val')['digest']}:{config.eval.sequences}",
    )


def read_calibration(config: Config) -> npt.NDArray[np.int64]:
    """Return ``quantization.calibration_sequences`` sequences, evenly spaced in the training
    data, or all if there are fewer; int64 [sequences, T].

    Raises:
        UserError: no training data, or less than one sequence.
    """
    stream = TokenStream(find_split(config, "train"), config.model.vocab_size)
    windows = Windows(stream, config.model.seq_len, config.model.seq_len)
    count = min(config.quantization.calibration_sequences, len(windows))
    places = [index * len(windows) // count for index in range(count)]
    rows = [windows.read(range(place, place + 1), 1).tokens for place in places]
    return np.concatenate(rows)[:, :-1]


def evaluate_quantized(
    plan: QuantizationPlan,
    source: Source,
    config: Config,
    bytes_of: ByteCounter | None,
    world: World,
) -> list[QuantizedResult]:
    """Return the losses at each width; the same on every rank. Collective.

    Both sides of a gap come from the same passes, which are not compiled, over the same windows.

    Args:
        plan: From ``plan_quantization``.
        source: The model.
        config: The settings given to ``plan_quantization``.
        bytes_of: Counts the bytes of target tokens; None if there is no tokenizer.
        world: Ranks that share the work.

    Raises:
        UserError: on every rank: weights that cannot be quantized.
    """
    eager = config.parallel.model_copy(
        update={"compile": False, "activation_checkpointing": "none"}
    )
    phase, micro = source.description.phase, config.batch.micro
    model = load_model(source, eager, world)

    def evaluate() -> Score:
        return add_scores(
            score(model, part, phase=phase, micro=micro, bytes_of=bytes_of, world=world)
            for part in plan.windows.values()
        )

    full, results = evaluate(), []
    for settings in plan.widths:
        load_weights(source, model)
        parameters = quantize_model(
            model, plan.tokens, settings, phase=phase, micro=micro, world=world
        )
        artifact = Artifact(source.description, parameters)
        load_weights(replace(source, tensors=LazyTensors(parameters, artifact.tensor)), model)
        results.append(_result(plan, settings, full, evaluate()))
    return results


def _result(
    plan: QuantizationPlan, settings: QuantizationConfig, full: Score, quantized: Score
) -> QuantizedResult:
    has_bytes = full.num_bytes > 0
    return QuantizedResult(
        settings=settings,
        matrices=plan.matrices,
        validated_on=plan.validated_on,
        loss=quantized.loss,
        full_loss=full.loss,
        bits_per_byte=quantized.bits_per_byte if has_bytes else None,
        full_bits_per_byte=full.bits_per_byte if has_bytes else None,
    )


def describe(results: Iterable[QuantizedResult]) -> list[str]:
    """Return the lines of the command: full precision, then each width with its gap."""
    lines: list[str] = []
    for one in results:
        if not lines:
            lines.append(f"full     {_losses(one.full_loss, one.full_bits_per_byte)}")
        bits = None
        if one.bits_per_byte is not None and one.full_bits_per_byte is not None:
            bits = one.bits_per_byte - one.full_bits_per_byte
        lines.append(
            f"{one.settings.matrix_bits} bits   {_losses(one.loss, one.bits_per_byte)}; gap "
            f"{_losses(one.loss - one.full_loss, bits, '+')}; {one.matrices} matrices quantized"
        )
    return lines


def _losses(loss: float, bits_per_byte: float | None, sign: str = "") -> str:
    bits = "" if bits_per_byte is None else f", {bits_per_byte:{sign}.6f} bits per byte"
    return f"{loss:{sign}.6f} nats per token{bits}"
