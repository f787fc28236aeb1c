from __future__ import annotations

import json
from pathlib import Path

import pytest

from jepa_dist.data import prepared_report
from jepa_dist.data.prepare import main


def test_the_report_counts_documents_of_all_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_report, "_BLOCK_TOKENS", 7)
    sizes = [1, 2, 3, 4, 7, 8, 30, 100]  # bytes, and a token more that begins the document
    (tmp_path / "a.txt").write_text("|".join("x" * size for size in sizes))
    (tmp_path / "val.txt").write_text("yyy")
    arguments = [
        *(str(tmp_path / "a.txt"), "--val", str(tmp_path / "val.txt")),
        *("--separator", "|", "--shard-tokens", "20", "--workers", "1", "--report"),
        *("--out", str(tmp_path / "out")),
    ]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["train"] == {
        "documents": 8,
        "tokens": sum(sizes) + 8,
        "text_bytes": sum(sizes),
        "bytes_per_token": round(sum(sizes) / (sum(sizes) + 8), 4),
        "mean_length": round(sum(sizes) / 8 + 1, 2),
        "longest": 101,
        "lengths": {"2": 1, "4": 2, "8": 2, "16": 1, "32": 1, "128": 1},
    }
    assert found["val"]["lengths"] == {"4": 1}
    shown = capsys.readouterr().out
    assert "train: 8 documents, 163 tokens, 0.951 bytes per token, mean length 20.4" in shown
    assert main(arguments) == 0  # is prepared already
    assert "already prepared" in capsys.readouterr().out
