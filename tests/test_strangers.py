"""Untrusted files: reading them runs no code and touches nothing outside their folder.

Errors of crafted files (one line, bounded time and memory) are in test_hostile.py,
test_data_hostile.py, test_config_input.py and the tests of each format. SECURITY.md lists them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jepa_dist
from jepa_dist.checkpoint.__main__ import main as checkpoint_command
from jepa_dist.config import Config, load
from jepa_dist.data.check import check_data
from jepa_dist.data.meta import read_meta
from jepa_dist.data.shards import write_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.weights import find_weights
from jepa_dist.interop import parameter_golf
from jepa_dist.interop.hf.export_folder import Options, write_folder
from jepa_dist.interop.safetensors_io import Description
from jepa_dist.monitor.run_dir import check_run_files
from jepa_dist.quantize.artifact import brotli, read_artifact, to_float16, write_artifact
from jepa_dist.report.runs import read_runs
from tests.support.crafted import make_checkpoint
from tests.support.golden_cases import GOLDEN_DIR
from tests.support.limits import run_limited
from tests.support.tiny import tiny_config
from tests.support.trained_run import PHASE, noisy_model, save_export
from tests.support.watched import watched

SECONDS, MEGABYTES = 30.0, 1500
pytestmark = pytest.mark.timeout(180)

# A module that a library imports, or an interpreter runs by itself, if it is found in a folder.
PLANTED = (
    *("modeling_jepa_gpt.py", "tokenization_jepa_gpt.py", "sitecustomize.py", "torch.py"),
    *("json.py", "conftest.py", "setup.py", "__init__.py", "jepa_dist.py"),
)
Reader = Callable[[], object]


class Evil:
    """Runs a program when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch trace",)


def checkpoint(folder: Path) -> Reader:
    path = make_checkpoint(folder / "checkpoints", 8)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    out = folder / "out"

    def read() -> None:
        checkpoint_command(["verify", str(path)])
        checkpoint_command(["ls", str(path.parent)])
        checkpoint_command(["export", str(path), str(out)])

    return read


def shards(folder: Path) -> Reader:
    for name in ("train_0", "val_0"):
        write_shard(folder / f"{name}.bin", np.arange(100))
    (folder / "meta.json").write_text(
        json.dumps({"tokenizer": "os.system('touch trace')", "files": ["../../etc/passwd"]})
    )
    data = {"train": f"{folder}/train_*.bin", "val": f"{folder}/val_*.bin"}
    model = {"seq_len": 16, "vocab_size": 257}
    config = Config.model_validate({"model": model, "data": data})

    def read() -> None:
        ignoring_user_errors(lambda: read_meta(folder))
        ignoring_user_errors(lambda: check_data(config))

    return read


def configuration(folder: Path) -> Reader:
    evil = folder / "evil.yaml"
    evil.write_text("seed: !!python/object/apply:os.system ['touch trace']\n")
    sound = folder / "sound.yaml"
    sound.write_text("seed: 3\nrun:\n  dir: /nowhere/at/all\ndata:\n  train: /etc/passwd\n")

    def read() -> None:
        ignoring_user_errors(lambda: load(str(evil), [], {}))
        assert load(str(sound), [], {}).config.seed == 3

    return read


def artifact(folder: Path) -> Reader:
    config = tiny_config(folder)
    parameters = {n: to_float16(p) for n, p in noisy_model(config).named_parameters()}
    described = Description(step=1, phase=PHASE, weights="live", config=config)
    brotli()  # imports it
    write_artifact(folder / "model.jepaq", parameters, described)
    return lambda: read_artifact(folder / "model.jepaq")


def run_directory(folder: Path) -> Reader:
    run = folder / "run"
    run.mkdir()
    record = {"step": 3, "loss/ce": 2.0, "text": "\x1b[2J$(touch trace)`touch trace`"}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "data.json").write_text('{"train": {"digest": "1"}, "val": {"digest": "../../x"}}')
    (run / "status.json").write_text('{"state": "running", "step": 3, "checkpoint": "../../x"}')

    def read() -> None:
        check_run_files(run)
        assert len(read_runs([run])) == 1

    return read


def hf_folder(folder: Path) -> Reader:
    config = tiny_config(folder)
    model = noisy_model(config)
    described = Description(step=1, phase=PHASE, weights="live", config=config)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    write_folder(folder / "hf", tensors, described, {}, None, {}, Options())
    for name in PLANTED:
        (folder / "hf" / name).write_text("import os; os.system('touch trace')")
    return lambda: (find_weights(folder / "hf", "live"), jepa_dist.load(folder / "hf"))


def whole_model(folder: Path) -> Reader:
    config = tiny_config(folder)
    save_export(folder / "run", 1, config, noisy_model(config))
    return lambda: jepa_dist.load(folder / "run")


def final_model(folder: Path) -> Reader:
    path = folder / "final_model.pt"
    torch.save({"tok_emb.weight": Evil()}, folder / "evil.pt")
    torch.save({"tok_emb.weight": torch.zeros(2)}, path)
    os.mkfifo(folder / "fifo.pt")

    def read() -> None:
        for name in ("evil.pt", "fifo.pt"):
            with pytest.raises(UserError):
                parameter_golf.read_final_model(folder / name)
        assert parameter_golf.read_final_model(path)

    return read


def sentencepiece(folder: Path) -> Reader:
    pytest.importorskip("sentencepiece")
    path = shutil.copy(GOLDEN_DIR / "bpb_p1_tok.model", folder / "tokenizer.model")
    return lambda: load_tokenizer(str(path)).encode(b"text")


def ignoring_user_errors(call: Callable[[], object]) -> None:
    try:
        call()
    except UserError:
        return


READERS = (
    *(checkpoint, shards, configuration, artifact, run_directory, hf_folder, whole_model),
    *(final_model, sentencepiece),
)


@pytest.mark.parametrize("make", READERS, ids=[make.__name__ for make in READERS])
def test_reading_stays_in_the_folder_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Reader]
) -> None:
    monkeypatch.chdir(tmp_path)
    read = make(tmp_path)
    for name in PLANTED:
        (tmp_path / name).write_text("import os; os.system('touch trace')")
    outcome = run_limited(watched(read, tmp_path), SECONDS, MEGABYTES)
    assert outcome.kind == "ok", outcome.text
    seen = [line for line in outcome.lines if line.startswith(("opens", "runs", "os.", "s", "p"))]
    assert seen == [], outcome.text
    assert not (tmp_path / "trace").exists()


def test_the_audit_hook_reports_every_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("x = 1\n")

    def act() -> None:
        Path("/etc/hostname").read_bytes()
        exec(compile("x = 1", str(tmp_path / "code.py"), "exec"))
        pickle.loads(pickle.dumps(Evil()))

    outcome = run_limited(watched(act, tmp_path / "inside"), SECONDS, MEGABYTES)
    assert [line.split()[0] for line in outcome.lines[:3]] == ["opens", "runs", "pickle.find_class"]
    assert "os.system" in outcome.lines[3]


# ---------------------------------------------------------------------------- tokenizers


def pre_tokenizer(pattern: str) -> bytes:
    """Return a byte-level ``tokenizer.json`` that splits text by this pattern."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(0x100 + n) for n in range(len(others)))]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)} | {"<s>": 256}}
    cuts = [{**split, "invert": False}, {**byte_level, "use_regex": False}]
    return json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "decoder": byte_level,
            "model": {**model, "merges": []},
        }
    ).encode()


def cut(data: bytes, seed: int) -> bytes:
    """Damage a file: change bytes and cut off the end."""
    chance = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(20):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged[: chance.randrange(len(damaged) // 2, len(damaged))])


def zipped() -> bytes:
    """Write a gigabyte of zeros, compressed to a megabyte."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    return packed.getvalue()


TOKENIZERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a pickle": ("t.model", lambda: pickle.dumps(Evil())),
    "a zip": ("t.model", zipped),
    "deep JSON": ("t.json", lambda: b"[" * 10**6),
    "JSON without a model": ("t.json", lambda: b'{"model": 3}'),
    "an id beyond reason": (
        "t.json",
        lambda: pre_tokenizer("a").replace(b'"<s>": 256', b'"<s>": 4294967295'),
    ),
    "a pattern without end": ("t.json", lambda: pre_tokenizer("(a|a)*b|((x+)+)+y")),
    "a wrong pattern": ("t.json", lambda: pre_tokenizer("(")),
    "a rank beyond reason": ("t.tiktoken", lambda: b"YQ== 99999999999999\n"),
    "a rank twice": ("t.tiktoken", lambda: b"YQ== 0\nYg== 0\n"),
    **{
        f"damage {seed}": (
            "t.model",
            lambda seed=seed: cut((GOLDEN_DIR / "bpb_p1_tok.model").read_bytes(), seed),
        )
        for seed in range(3)
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_untrusted_tokenizer(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tokenizers")
    file, content = TOKENIZERS[name]
    path = tmp_path / file
    path.write_bytes(content())

    def use() -> None:
        tokenizer = load_tokenizer(str(path))
        tokenizer.encode(b"aaaa xxxx " * 100 + b"a" * 60 + b"x" * 60)

    outcome = run_limited(watched(use, tmp_path), SECONDS, MEGABYTES)
    assert outcome.kind in ("ok", "refused"), f"{outcome.kind}: {outcome.text[-3000:]}"
    assert len(outcome.lines) == (outcome.kind == "refused"), outcome.text
    assert len(outcome.text) < 1000
