"""metrics.jsonl and TensorBoard: the same numbers in both (contract C8)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

# Number, text (in metrics.jsonl only), or None: does not apply at this step.
Record = Mapping[str, Any]


class MetricsWriter:
    """Writes one record per logged step; for rank 0 only.

    Args:
        run_dir: Where both live.
        step: Steps done before this start; what an earlier start recorded beyond is dropped,
            since those steps are taken again.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        metrics = run_dir / "metrics.jsonl"
        _drop_records_beyond(metrics, step)
        self._file = metrics.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text in TensorBoard, as it stands."""
        self._board.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def write(self, record: Record) -> None:
        """Append one record; its ``step`` places the scalars in TensorBoard."""
        self._file.write(json.dumps(record) + "\n")
        for tag, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and tag != "step":
                self._board.add_scalar(tag, value, record["step"])
        if "sample" in record:
            self.text("sample", record["sample"], record["step"])
        self._board.flush()

    def summary(self, record: Record) -> None:
        """Append the closing record of a finished run; its numbers are in TensorBoard already."""
        self._file.write(json.dumps({**record, "final": True}) + "\n")

    def close(self) -> None:
        """Flush both."""
        self._board.close()
        self._file.close()


def _drop_records_beyond(metrics: Path, step: int) -> None:
    """Rewrite the file in one step; a last line that was cut short goes, too."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step and "final" not in record:
            kept.append(line + "\n")
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(metrics)
