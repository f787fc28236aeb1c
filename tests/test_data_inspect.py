from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jepa_dist.data import inspect_shards
from jepa_dist.data.inspect_shards import main, summarize
from jepa_dist.data.shards import Shard, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Three documents of bytes, the last one empty."""
    ids = [256, *b"low\n tide", 256, *b"\x1b[31mred\xff", 256]
    write_shard(tmp_path / "a.bin", np.array(ids))
    meta = {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256, "shards": {"a.bin": len(ids)}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "a.bin"


def test_documents_are_shown_as_text(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shard)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{shard}: 21 tokens (uint16), ids 10..256, 3 documents",
        "  document 1: tokens 1 to 9",
        "    low",
        "     tide",
        "  document 2: tokens 11 to 19",
        "    \\x1b[31mred\ufffd",
        "  document 3: tokens 21 to 20",
    ]


def test_without_a_tokenizer_ids_are_shown(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard.parent / "meta.json").unlink()
    assert main([str(shard), "--bos-id", "256", "--documents", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  document 1: tokens 1 to 9",
        "    108 111 119 10 32 116 105 100 101",
    ]
    assert main([str(shard)]) == 0
    assert capsys.readouterr().out == f"{shard}: 21 tokens (uint16), ids 10..256\n"


@pytest.mark.parametrize("wanted", [0, 1, 2, 9])
def test_output_does_not_depend_on_block_size(
    shard: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    whole = summarize(Shard(shard), 256, wanted)
    assert (whole.documents, len(whole.first)) == (3, min(wanted, 3))
    monkeypatch.setattr(inspect_shards, "_BLOCK_TOKENS", 4)
    assert summarize(Shard(shard), 256, wanted) == whole


def test_a_user_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.bin")]) == 2
    assert "no token shard matches" in capsys.readouterr().err
