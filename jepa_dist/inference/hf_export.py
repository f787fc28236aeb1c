"""``jepa_dist export --format hf``: the files of the folder besides the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.files import MIB, read_json
from jepa_dist.inference.stored import Stored
from jepa_dist.interop.hf.export_folder import Options, write_folder
from jepa_dist.interop.hf.tokenizer_files import tokenizer_files
from jepa_dist.monitor.metrics_file import number, read_records


def export_hf(stored: Stored, run: Path, out: Path, options: Options) -> Path:
    """Write the folder ``out``; return the path of the index of its weights.

    Args:
        stored: The weights; each tensor is read when it is written.
        run: The path given by the user; a run directory has facts on data and validation.
        out: The folder.
        options: Dtype and sizes.

    Raises:
        UserError: the tokenizer's file is missing, weights that are not finite, or the folder
            cannot be written.
    """
    config = stored.description.config
    tokenizer = load_checked_tokenizer(config, ())
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        assert config.data.tokenizer is not None
        files = tokenizer_files(config.data.tokenizer, tokenizer, config.model.seq_len)
    bos_id = config.data.bos_id if tokenizer is None else tokenizer.bos_id
    facts = _facts(run, stored.description.step)
    return write_folder(out, stored.tensors, stored.description, files, bos_id, facts, options)


def _facts(run: Path, step: int | None) -> dict[str, str]:
    """Return the data's fingerprint and the validation after ``step``, if the run has them."""
    facts = {}
    try:
        data: Any = read_json(run / "data.json", MIB)
        facts["training data"] = str(data["train"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        for record in read_records(run / "metrics.jsonl"):
            if record is None or record["step"] != step:
                continue
            for key in ("val/loss", "val/bpb"):
                value = number(record, key)
                if value is not None:
                    facts[key] = f"{value:.6g}"
    except OSError:
        pass
    return facts
