"""metrics.jsonl and TensorBoard: the same numbers in both (honest numbers)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jepa_dist.files import make_new, partial_name
from jepa_dist.monitor.charts import LAYOUT
from jepa_dist.monitor.events import Appendable, EventFile
from jepa_dist.monitor.images import cos_image
from jepa_dist.monitor.metrics_file import METRICS, Record, encode, read_records
from jepa_dist.optim.histograms import Distribution

# Records with one of these keys describe the end of an earlier start.
_ENDS = {"final", "diverged"}


class MetricsWriter:
    """Writer of one record per logged step; for rank 0 only.

    If the disk is full or read-only, training continues: such records are lost, and ``warn`` is
    called once, and again when writing works.

    Args:
        run_dir: The run directory.
        step: Steps completed before this start; records of later steps are dropped, since those
            steps are repeated.
        warn: Prints a warning for the user.
    """

    def __init__(
        self, run_dir: Path, step: int = 0, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self._warn = warn
        self._run_dir = run_dir
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
        """Add a text to TensorBoard, shown preformatted."""
        self._attempt([lambda: self._board.text(tag, text, step)])

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        """Add histograms to TensorBoard, by tag."""
        self._attempt(
            lambda tag=tag, value=value: self._board.histogram(tag, value, step)  # type: ignore[misc]
            for tag, value in values.items()
        )

    def write(self, record: Record) -> None:
        """Append one record, and add its scalars to TensorBoard at its ``step``."""
        self._attempt(
            [
                lambda: self._file.append(encode(record)),
                lambda: self._board.scalars(_scalars(record), record["step"]),
                lambda: self._extras(record),
            ]
        )

    def summary(self, record: Record, settings: Mapping[str, Any]) -> None:
        """Append the closing record of a finished run, and add the run with these ``settings`` to
        TensorBoard's HParams table."""
        results = {tag: value for tag, value in _scalars(record).items() if tag.startswith("val/")}
        self._attempt(
            [
                lambda: self._file.append(encode({**record, "final": True})),
                lambda: self._board.hparams(settings, results, record["step"]),
            ]
        )

    def diverged(self, step: int, reason: str) -> None:
        """Append a record that the run diverged after ``step``; a later start drops it."""
        record = {"step": step, "diverged": True, "reason": reason}
        self._attempt([lambda: self._file.append(encode(record))])

    def close(self) -> None:
        """Close both files."""
        self._board.close()
        self._file.close()

    def _extras(self, record: Record) -> None:
        """Add a record's text and image to TensorBoard."""
        if "sample" in record:
            self._board.text("sample", record["sample"], record["step"])
        if "jepa/cos_table" in record:
            image_HWC = cos_image(record["jepa/cos_table"]["cos"])
            self._board.image("jepa/cos_table", image_HWC, record["step"])

    def _attempt(self, writes: Iterable[Callable[[], None]]) -> None:
        """Try every write, even if others fail."""
        before = self._missing
        for write in writes:
            try:
                write()
            except OSError as error:
                if self._missing == 0:
                    place = error.filename or self._run_dir
                    self._warn(
                        f"metrics cannot be written ({error.strerror}: {place}); training "
                        "continues without them; free disk space for run.dir, or make it writable "
                        "again"
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
    """Rewrite the file atomically, without invalid lines and records after ``step``."""
    if not metrics.exists():
        return
    partial = partial_name(metrics)
    with make_new(partial) as file:
        for record in read_records(metrics):
            if record is not None and record["step"] <= step and not _ENDS & record.keys():
                file.write(encode(record))
    partial.replace(metrics)
