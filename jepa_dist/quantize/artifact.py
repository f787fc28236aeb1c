"""The artifact file: magic, digest, size, and one brotli stream that holds a safetensors file.

    bytes 0 to 7    magic
          8 to 39   SHA-256 of all that follows
         40 to 47   size of the safetensors file, little-endian
         48 to end  the safetensors file, compressed

The safetensors file holds, for each parameter, either ``float16/NAME`` or ``q/NAME`` (int8) and
``scale/NAME`` (float16, one per row), and in its metadata the description of the model. Nothing
in it is executed or unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from jepa_dist.config import check
from jepa_dist.errors import UserError
from jepa_dist.files import read_bytes
from jepa_dist.interop.safetensors_io import Description, Weights, publish
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.model.gpt import GPT
from jepa_dist.quantize.gptq import QuantizedMatrix

SUFFIX = ".jepaq"

_MAGIC = b"JEPAQNT1"
_DIGEST = slice(8, 40)
_SIZE = slice(40, 48)
_HEADER_BYTES = 48
# Far more than any model for which such slow compression makes sense.
_MOST_BYTES = 4 * 2**30
_PIECE_BYTES = 2**24
_QUALITY, _WINDOW_BITS = 11, 24
_DESCRIPTION = "description"

Stored = QuantizedMatrix | Tensor
"""A parameter as stored in the file: quantized, or float16."""


def find_artifact(path: Path, weights: Weights) -> Path | None:
    """Return the artifact at ``path``, or the one in that folder.

    None if there is none, or if the folder also has weights that are not quantized.
    """
    if path.suffix == SUFFIX:
        return path
    inside = path / artifact_name(weights)
    others = ("checkpoints", "model.safetensors", "ema.safetensors")
    alone = not any((path / name).exists() for name in others)
    return inside if alone and inside.is_file() else None


def artifact_name(weights: Weights) -> str:
    """Return the name of an artifact with these weights in its folder."""
    return f"{'ema' if weights == 'ema' else 'model'}{SUFFIX}"


@dataclass(frozen=True)
class Artifact:
    """Contents of an artifact file."""

    description: Description
    parameters: Mapping[str, Stored]
    """Parameters by name; shapes are those of the described model."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters, float32, by name."""
        return {name: self.tensor(name) for name in self.parameters}

    def tensor(self, name: str) -> Tensor:
        """Return one parameter, float32."""
        stored = self.parameters[name]
        return stored.dequantize() if isinstance(stored, QuantizedMatrix) else stored.float()


# ---------------------------------------------------------------------------- writing


def to_float16(tensor: Tensor) -> Tensor:
    """Return a small tensor as it is stored.

    Raises:
        UserError: it has values outside the range of float16.
    """
    half = tensor.detach().cpu().half()
    if not half.isfinite().all():
        raise UserError(
            f"cannot be stored as float16: its largest magnitude is {tensor.abs().max().item():.3g}"
        )
    return half


def write_artifact(path: Path, parameters: Mapping[str, Stored], description: Description) -> int:
    """Write the file atomically; return its size in bytes.

    Raises:
        UserError: brotli is not installed, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, stored in parameters.items():
        if isinstance(stored, QuantizedMatrix):
            tensors |= {f"q/{name}": stored.q_RC, f"scale/{name}": stored.scale_R}
        else:
            tensors[f"float16/{name}"] = stored
    payload = safetensors_torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {_DESCRIPTION: description.model_dump_json(by_alias=True)},
    )
    compressed = brotli().compress(payload, quality=_QUALITY, lgwin=_WINDOW_BITS)
    body = len(payload).to_bytes(8, "little") + compressed
    data = _MAGIC + hashlib.sha256(body).digest() + body
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, lambda partial: partial.write_bytes(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}; name another folder") from None
    return len(data)


def brotli() -> ModuleType:
    """Return the brotli module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import brotli as library
    except ImportError:
        raise UserError(
            "artifacts need the brotli library, which is not installed; "
            "pip install 'jepa_dist[quantize]'"
        ) from None
    return library


# ---------------------------------------------------------------------------- reading


def read_artifact(path: Path) -> Artifact:
    """Read a file and verify its digest.

    Raises:
        UserError: missing, damaged, not an artifact, or brotli is not installed.
    """
    payload = _decompress(path, _read_body(path))
    try:
        tensors = safetensors_torch.load(payload)
        length = int.from_bytes(payload[:8], "little")
        text = from_json(payload[8 : 8 + length])["__metadata__"][_DESCRIPTION]
        description = Description.model_validate_json(text)
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise _damaged(path, f"it does not hold a described model ({reason:.200})") from None
    problems = check(description.config)
    if problems:
        raise UserError(*(f"{path}: config: {problem}" for problem in problems))
    parameters = _parameters(path, tensors)
    _check_parameters(path, parameters, description)
    return Artifact(description, parameters)


def _read_body(path: Path) -> bytes:
    """Return everything after the digest, verified."""
    try:
        data = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if data[: len(_MAGIC)] != _MAGIC:
        raise UserError(
            f"{path}: is not a quantized artifact of this version; expected the file that "
            "jepa_dist export --format artifact writes"
        )
    if len(data) < _HEADER_BYTES:
        raise _damaged(path, f"it ends after {len(data)} bytes")
    body = data[_DIGEST.stop :]
    found, expected = hashlib.sha256(body).hexdigest(), data[_DIGEST].hex()
    if found != expected:
        raise _damaged(path, f"SHA-256 is {found}, expected {expected}")
    return body


def _decompress(path: Path, body: bytes) -> bytes:
    """Return the safetensors file; memory is bounded by the actual data, not the claimed size."""
    library = brotli()
    size, data = int.from_bytes(body[:8], "little"), body[8:]
    if size > _MOST_BYTES:
        raise _damaged(path, f"it claims to hold {size} bytes, more than {_MOST_BYTES}")
    decompressor, pieces, total = library.Decompressor(), [], 0
    try:
        while not decompressor.is_finished():
            piece = decompressor.process(data, output_buffer_limit=_PIECE_BYTES)
            total += len(piece)
            pieces.append(piece)
            is_stuck = not piece and not data
            data = b""
            if total > size or is_stuck:
                break
    except library.error as error:
        raise _damaged(path, f"not a brotli stream ({error})") from None
    if total != size or not decompressor.is_finished():
        raise _damaged(path, f"its stream does not hold the {size} bytes that it claims to")
    return b"".join(pieces)


def _parameters(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Return the parameters by name; raise for tensors that are never written."""
    parameters: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        scale = tensors.get(f"scale/{name}")
        if kind == "float16" and tensor.dtype == torch.float16 and f"q/{name}" not in tensors:
            parameters[name] = tensor
        elif kind == "q" and _are_rows(tensor, scale):
            assert scale is not None
            parameters[name] = QuantizedMatrix(tensor, scale)
        elif not (kind == "scale" and f"q/{name}" in tensors):
            raise _damaged(path, f"{key:.100}: {tensor.dtype} {tuple(tensor.shape)} is no part")
    return parameters


def _are_rows(q: Tensor, scale: Tensor | None) -> bool:
    is_matrix = q.dtype == torch.int8 and q.dim() == 2
    return (
        is_matrix
        and scale is not None
        and scale.dtype == torch.float16
        and scale.shape == q.shape[:1]
    )


def _check_parameters(
    path: Path, parameters: Mapping[str, Stored], description: Description
) -> None:
    with torch.device("meta"):
        model = GPT(description.config.model)
    expected = {n: Signature(tuple(p.shape), "") for n, p in model.named_parameters()}
    found = {name: Signature(_shape(stored), "") for name, stored in parameters.items()}
    problems = mismatches(str(path), expected, found)
    if problems:
        raise UserError(*problems)


def _shape(stored: Stored) -> tuple[int, ...]:
    return tuple(stored.q_RC.shape if isinstance(stored, QuantizedMatrix) else stored.shape)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged artifact: {reason}; copy or export it again")
