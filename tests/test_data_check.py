from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_dist.config import Config
from jepa_dist.data.check import check_data
from jepa_dist.data.meta import read_meta
from jepa_dist.data.shards import write_shard
from jepa_dist.errors import UserError
from tests.support.patience import patience


def config(folder: Path, seq_len: int = 16, vocab_size: int = 257, **data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"seq_len": seq_len, "vocab_size": vocab_size},
            "data": {"train": f"{folder}/train_*.bin", "val": f"{folder}/val_*.bin", **data},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for first, split in enumerate(("train", "val")):
        for i in range(2):
            write_shard(tmp_path / f"{split}_{i}.bin", np.arange(first, first + 100))
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def test_good_data_pass(folder: Path) -> None:
    check_data(config(folder))
    (folder / "meta.json").unlink()  # shards from elsewhere have none
    assert read_meta(folder) is None
    check_data(config(folder))


def test_at_least_one_window_is_needed(folder: Path) -> None:
    check_data(config(folder, seq_len=99))
    with pytest.raises(UserError) as error:  # windows of validation run through all shards
        check_data(config(folder, seq_len=100))
    (problem,) = error.value.problems
    assert problem.startswith(f"data.train='{folder}/train_*.bin': no shard holds one window")
    assert "= 101 tokens (the largest has 100)" in problem
    with pytest.raises(UserError, match=r"data\.val=.*: its 200 tokens do not fill one window"):
        check_data(config(folder, seq_len=200))


def test_every_header_is_checked(folder: Path) -> None:
    path = folder / "train_1.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train_1\.bin: the header promises 100 tokens"):
        check_data(config(folder))


def test_all_problems_are_reported_at_once(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        check_data(config(folder, vocab_size=256, train=f"{folder}/none_*.bin", tokenizer="x"))
    text = str(error.value)
    assert "data.train" in text
    assert "data.tokenizer" in text


def test_a_vocabulary_size_unlike_the_model_is_reported(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        check_data(config(folder, vocab_size=300))
    assert "data.tokenizer='bytes': has 257 ids, but model.vocab_size=300" in str(error.value)
    assert "meta.json says vocab_size=257, but model.vocab_size=300" in str(error.value)


def test_another_tokenizer_of_the_same_size_is_reported(folder: Path) -> None:
    meta = {"tokenizer": "sentencepiece 00", "vocab_size": 257, "shards": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"the tokenizer was 'sentencepiece 00'"):
        check_data(config(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_meta_is_reported(folder: Path, text: str) -> None:
    (folder / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json: damaged"):
        check_data(config(folder))


def test_checking_and_preparing_do_not_import_torch() -> None:
    code = (
        "import sys, jepa_dist.data.check, jepa_dist.data.prepare, jepa_dist.data.baseline;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=patience(60)).returncode == 0
