"""Write a folder that transformers loads, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_dist.config import ModelConfig
from jepa_dist.errors import UserError
from jepa_dist.files import MIB, read_json, write_atomically
from jepa_dist.interop.hf.card import model_card
from jepa_dist.interop.safetensors_io import Description, publish, read_description_file
from jepa_dist.interop.tensor_file import DTYPES, LazyTensors, TensorFile, lazy_tensors
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.model.gpt import GPT

_CODE = Path(__file__).parent / "modeling_jepa_gpt.py"
_INDEX = "model.safetensors.index.json"
_DESCRIPTION = "jepa_dist.json"
_FILE = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_MOST_INDEX_BYTES = 32 * MIB


@dataclass(frozen=True)
class Options:
    """Options for writing the weights."""

    dtype: torch.dtype = torch.float32
    shard_bytes: int = 4 * 10**9
    """Maximum size of a file in bytes, unless one tensor is larger."""
    allow_not_finite: bool = False


def write_folder(
    out: Path,
    tensors: Mapping[str, Tensor],
    description: Description,
    tokenizer: Mapping[str, bytes],
    bos_id: int | None,
    facts: Mapping[str, str],
    options: Options,
) -> Path:
    """Write weights, configuration, code, tokenizer and model card; the index comes last.

    Args:
        out: The folder; created if missing. Weights of an earlier export in it are replaced.
        tensors: The weights by parameter name. Each is looked up once, when it is written.
        description: Description of the weights.
        tokenizer: Contents of the tokenizer's files, by name.
        bos_id: The token that begins, and so ends, a document.
        facts: Facts on the run, for the model card.
        options: Dtype and sizes.

    Returns:
        Path of the index.

    Raises:
        UserError: weights that are not finite, or the folder cannot be written.
    """
    with torch.device("meta"):
        model = GPT(description.config.model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    unlike = tensors.keys() ^ shapes.keys()
    if unlike:
        raise UserError(f"{sorted(unlike)[0]}: the weights are not those of the described model")
    dtype = options.dtype
    shards = list(_shards(shapes, dtype.itemsize, options.shard_bytes))
    texts: dict[str, str] = {
        "config.json": _json(_config(description, dtype, bos_id)),
        "generation_config.json": _json(_generation(bos_id)),
        _DESCRIPTION: _without_metadata(description),
        "README.md": model_card(description, facts),
        _CODE.name: _CODE.read_text(encoding="utf-8"),
    }
    weight_map: dict[str, str] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _INDEX).unlink(missing_ok=True)
        for old in out.glob("model-*-of-*.safetensors"):
            old.unlink()
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = _Shard({name: shapes[name] for name in names}, dtype, options.allow_not_finite)
            publish(out / file, partial(shard.write, tensors))
            weight_map |= dict.fromkeys(names, file)
        for name, content in tokenizer.items():
            publish(out / name, partial(_write_bytes, content))
        for name, text in texts.items():
            write_atomically(out / name, text, sync=True)
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(out / _INDEX, _json(index), sync=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}; name another folder") from None
    return out / _INDEX


def is_hf_folder(path: Path) -> bool:
    """Return whether a path looks like what ``write_folder`` writes."""
    return (path / _INDEX).is_file()


def read_folder(folder: Path) -> tuple[Description, Mapping[str, Tensor]]:
    """Return the description and the weights (float32, each read when it is looked up).

    Raises:
        UserError: files that are missing or damaged, or weights that do not match the described
            model; all of them.
    """
    description = read_description_file(folder / _DESCRIPTION)
    files = {name: lazy_tensors(folder / name) for name in _files_of(folder)}
    tensors = LazyTensors(
        (name for file in files.values() for name in file),
        lambda name: next(file for file in files.values() if name in file)[name].float(),
    )
    with torch.device("meta"):
        model = GPT(description.config.model)
    expected = {name: Signature(tuple(p.shape), "") for name, p in model.named_parameters()}
    problems = mismatches(str(folder), expected, dict(_signatures(folder, files)))
    if problems:
        raise UserError(*problems)
    return description, tensors


def _signatures(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, Signature]]:
    for name in files:
        with TensorFile(folder / name) as file:
            yield from ((n, Signature(found.shape, "")) for n, found in file.signatures().items())


def _files_of(folder: Path) -> list[str]:
    """Return the names of the files with weights, which must be those of ``write_folder``."""
    try:
        index = read_json(folder / _INDEX, _MOST_INDEX_BYTES)
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _INDEX}: cannot be read: {error!r:.200}") from None
    for name in names:
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise UserError(
                f"{folder / _INDEX}: names a file {name!r:.80}; expected model-N-of-N.safetensors"
            )
    return names


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _shards(shapes: Mapping[str, torch.Size], item_bytes: int, limit: int) -> Iterator[list[str]]:
    """Yield the names of each file's tensors, in the model's order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * item_bytes
        if names and size + more > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


@dataclass(frozen=True)
class _Shard:
    """One safetensors file (https://github.com/huggingface/safetensors#format)."""

    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    allow_not_finite: bool

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write the new file ``path``."""
        with open(path, "r+b") as file:
            file.write(self._header())
            for name, shape in self.shapes.items():
                tensor = tensors[name].detach().cpu()
                if tensor.shape != shape:
                    raise UserError(
                        f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}; the "
                        "weights are not those of the described model"
                    )
                if not (self.allow_not_finite or tensor.isfinite().all()):
                    raise UserError(
                        f"{name}: is not finite; export an earlier checkpoint, or add --not-finite"
                    )
                flat = tensor.to(self.dtype).contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in self.shapes.items():
            end = position + math.prod(shape) * self.dtype.itemsize
            header[name] = {
                "dtype": DTYPES[self.dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def _without_metadata(description: Description) -> str:
    """Return the description as JSON, without metadata on the file that it was read from."""
    plain = description.model_copy(update={"metadata": {}})
    return plain.model_dump_json(by_alias=True, indent=1) + "\n"


def _config(description: Description, dtype: torch.dtype, bos_id: int | None) -> dict[str, Any]:
    model: ModelConfig = description.config.model
    same = (
        *("vocab_size", "seq_len", "num_layers", "model_dim", "num_heads", "num_kv_heads"),
        *("mlp_hidden", "tie_embeddings", "rope_base", "rotary_dims", "ln_scale", "xsa_last_n"),
        *("x0_mix", "branch_scales", "unet_skips", "skip_gates", "parallel_residual_start"),
        *("num_loops", "loop_start", "loop_end", "untie_loop_mlps", "logit_softcap"),
        "document_mask",
    )
    name = "modeling_jepa_gpt"
    return {
        "architectures": ["JepaGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{name}.JepaGPTConfig",
            "AutoModelForCausalLM": f"{name}.JepaGPTForCausalLM",
        },
        "model_type": "jepa_gpt",
        "dtype": str(dtype).removeprefix("torch."),
        **{key: getattr(model, key) for key in same},
        "embedding_dim": model.embed_width,
        "has_q_gain": model.qk_gain_init is not None,
        "phase": description.phase,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
    }


def _generation(bos_id: int | None) -> dict[str, Any]:
    return {"bos_token_id": bos_id, "eos_token_id": bos_id, "pad_token_id": bos_id}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
