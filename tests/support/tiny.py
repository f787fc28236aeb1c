"""A tiny corpus and a tiny recipe with every extra on, for real runs in seconds."""

from __future__ import annotations

import csv
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from jepa_dist.config import Config, load
from jepa_dist.data.prepare import main as prepare
from jepa_dist.data.shards import write_shard
from jepa_dist.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parent.parent.parent


def write_corpus(
    folder: Path, train_tokens: int = 6000, val_tokens: int = 260, num_ids: int = 61
) -> None:
    """Write shards of random ids below ``num_ids``, each close to the one before it."""
    generator = np.random.Generator(np.random.PCG64(0))
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train_0", train_tokens), ("train_1", 777), ("val_0", val_tokens)):
        walk = np.cumsum(generator.integers(-2, 3, count)) % num_ids
        write_shard(folder / f"{name}.bin", walk.astype(np.uint16))


def write_mixture(folder: Path) -> dict[str, str]:
    """Write the corpus and a second source, of ids 40 to 60; return ``mixture``."""
    write_corpus(folder)
    generator = np.random.Generator(np.random.PCG64(1))
    (folder / "other").mkdir(exist_ok=True)
    for name, count in (("train_0", 1500), ("val_0", 200)):
        write_shard(folder / "other" / f"{name}.bin", generator.integers(40, 61, count))
    return mixture(folder)


def mixture(folder: Path) -> dict[str, str]:
    """Return settings that mix the two sources 7 to 3, and 1 to 3 in the second half of the run."""
    folders = {"walk": folder, "other": folder / "other"}
    train, val = (
        [{"name": name, "shards": f"{path}/{split}_*.bin"} for name, path in folders.items()]
        for split in ("train", "val")
    )
    weighted = [{**source, "weight": w} for source, w in zip(train, (0.7, 0.3), strict=True)]
    return {
        "data__train": json.dumps(weighted),
        "data__val": json.dumps(val),
        "data__stages": '[{"at": 0.5, "weights": {"walk": 1, "other": 3}}]',
    }


def write_text_mixture(folder: Path) -> dict[str, Any]:
    """Prepare two sources of text with a tokenizer.json; return the settings that mix them.

    Needs the tokenizers package.
    """
    made = {"walk": folder, "other": folder / "other"}
    vocabulary = ["--train-tokenizer", "300"]
    for (name, out), module in zip(made.items(), (textwrap, csv), strict=True):
        text = Path(module.__file__).read_text(encoding="utf-8")
        for split, part in (("train", text[:-2000]), ("val", text[-2000:])):
            (folder / f"{name}_{split}.txt").write_text(part, encoding="utf-8")
        inputs = [f"{folder}/{name}_train.txt", "--val", f"{folder}/{name}_val.txt"]
        assert not prepare([*inputs, "--out", f"{out}/shards", "--workers", "1", *vocabulary])
        for shard in (out / "shards").glob("*.bin"):
            shard.rename(out / shard.name)
        vocabulary = ["--tokenizer", f"{folder}/shards/tokenizer.json"]
    tokenizer = folder / "shards" / "tokenizer.json"
    size = load_tokenizer(str(tokenizer)).vocab_size
    settings = {"data__tokenizer": tokenizer, "model__vocab_size": size, "train__steps": 8}
    return {**mixture(folder), **settings}


def tiny_overrides(folder: Path, **changes: Any) -> list[str]:
    """Return the tiny recipe as KEY=VALUE; ``changes`` write dots as double underscores."""
    settings: dict[str, Any] = {
        "run.dir": folder / "run",
        "data.train": folder / "train_*.bin",
        "data.val": folder / "val_*.bin",
        "data.workers": 0,
        "train.steps": 12,
        "train.log_every": 1,
        "train.enable_looping_at": 0.3,
        "train.loop_phase2_at": 0.6,
        "batch.sequences": 6,
        "batch.micro": 2,
        "model.seq_len": 24,
        "model.num_layers": 4,
        "model.model_dim": 32,
        "model.num_kv_heads": 2,
        "model.mlp_mult": 2,
        "model.rope_dims": 4,
        "model.qk_gain_init": 4,
        "model.ln_scale": True,
        "model.xsa_last_n": 4,
        "model.x0_mix": True,
        "model.branch_scales": True,
        "model.unet_skips": True,
        "model.skip_gates": True,
        "model.parallel_residual_start": 3,
        "model.num_loops": 2,
        "model.loop_start": 1,
        "model.loop_end": 2,
        "model.logit_softcap": 30,
        "jepa.lambda": 0.1,
        # Gentle rates: with the reference's, Adam turns rounding differences of 1e-7 into 1e-5
        # within ten steps on a batch as small as this.
        "optim.matrix_lr": 0.002,
        "optim.scalar_lr": 0.002,
        "optim.tied_embed_lr": 0.003,
        "optim.embed_lr": 0.01,
        "parallel.compile": False,
        "eval.every": 0,
        "eval.sample_tokens": 0,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={_yaml(value)}" for key, value in settings.items()]


def tiny_config(folder: Path, **changes: Any) -> Config:
    """Return the tiny recipe, validated."""
    return load(None, tiny_overrides(folder, **changes), {}).config


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
