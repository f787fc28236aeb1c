"""metrics.jsonl and TensorBoard: the same numbers in both (contract C8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jepa_dist.files import make_new, partial_name
from jepa_dist.monitor.events import Appendable, EventFile
from jepa_dist.monitor.images import cos_image
from jepa_dist.monitor.layout import LAYOUT
from jepa_dist.monitor.metrics_file import METRICS, Record, encode, read_records
from jepa_dist.optim.histograms import Distribution

# Records of these keys say how an earlier start ended.
_ENDS = {"final", "diverged"}


class MetricsWriter:
    """Writes one record per logged step; for rank 0 only.

    Where the disk is full or cannot be written, training goes on: what cannot be written is left
    out, and ``warn`` is told once, and once more when it can be written again.

    Args:
        run_dir: Where both live.
        step: Steps done before this start; what an earlier start recorded beyond is dropped,
            since those steps are taken again.
        warn: Tells the user.
    """

    def __init__(
        self, run_dir: Path, step: int = 0, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self._warn = warn
        self._missing = 0
        self._file = Appendable(run_dir / METRICS)
        self._board = EventFile(run_dir / "tensorboard", purge_step=step + 1)
        self._attempt(
            [
                lambda: _drop_records_beyond(run_dir / METRICS, step),
                lambda: self._board.layout(LAYOUT),
            ]
        )

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text in TensorBoard, as it stands."""
        self._attempt([lambda: self._board.text(tag, text, step)])

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        """Show distributions in TensorBoard, by tag."""
        self._attempt(
            lambda tag=tag, value=value: self._board.histogram(tag, value, step)  # type: ignore[misc]
            for tag, value in values.items()
        )

    def write(self, record: Record) -> None:
        """Append one record; its ``step`` places the scalars in TensorBoard."""
        self._attempt(
            [
                lambda: self._file.append(encode(record)),
                lambda: self._board.scalars(_scalars(record), record["step"]),
                lambda: self._extras(record),
            ]
        )

    def summary(self, record: Record, settings: Mapping[str, Any]) -> None:
        """Append the closing record of a finished run; its numbers are in TensorBoard already.

        There it becomes a line of the table that compares runs, with these ``settings``.
        """
        results = {tag: value for tag, value in _scalars(record).items() if tag.startswith("val/")}
        self._attempt(
            [
                lambda: self._file.append(encode({**record, "final": True})),
                lambda: self._board.hparams(settings, results, record["step"]),
            ]
        )

    def diverged(self, step: int, reason: str) -> None:
        """Append that the run has given up after ``step``; a start that goes on drops it."""
        record = {"step": step, "diverged": True, "reason": reason}
        self._attempt([lambda: self._file.append(encode(record))])

    def close(self) -> None:
        """Nothing more will be written."""
        self._board.close()
        self._file.close()

    def _extras(self, record: Record) -> None:
        """What TensorBoard shows besides curves."""
        if "sample" in record:
            self._board.text("sample", record["sample"], record["step"])
        if "jepa/cos_table" in record:
            image_HWC = cos_image(record["jepa/cos_table"]["cos"])
            self._board.image("jepa/cos_table", image_HWC, record["step"])

    def _attempt(self, writes: Iterable[Callable[[], None]]) -> None:
        """Do each, whether or not the others can be done."""
        before = self._missing
        for write in writes:
            try:
                write()
            except OSError as error:
                if self._missing == 0:
                    self._warn(
                        f"metrics cannot be written ({error.strerror}): training goes on without "
                        "them; make room on the disk of run.dir, or writing possible again"
                    )
                self._missing += 1
        if self._missing == before > 0:
            self._warn(f"metrics are written again; {self._missing} entries are missing")
            self._missing = 0


def _scalars(record: Record) -> dict[str, float]:
    return {
        tag: value
        for tag, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and tag != "step"
    }


def _drop_records_beyond(metrics: Path, step: int) -> None:
    """Rewrite the file in one step; a last line that was cut short goes, too."""
    if not metrics.exists():
        return
    partial = partial_name(metrics)
    with make_new(partial) as file:
        for record in read_records(metrics):
            if record is not None and record["step"] <= step and not _ENDS & record.keys():
                file.write(encode(record))
    partial.replace(metrics)
