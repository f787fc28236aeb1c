"""TensorBoard event file, written synchronously.

TensorBoard's own writer passes records to a thread: on a full disk that thread dies with a
traceback and leaves a partial record, at which every reader stops. Here a record is appended
completely or not at all, and errors are raised to the caller.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from jepa_dist.files import open_to_append
from jepa_dist.optim.histograms import Distribution

# {category: {chart: [kind, [tag patterns]]}}, the format of ``torch.utils.tensorboard``.
Layout = Mapping[str, Mapping[str, list[Any]]]


class Appendable:
    """A file to which complete records are appended.

    ``append`` returns after the write system call: a killed process loses no record, a host that
    loses power may. If the file is renamed or deleted meanwhile, a new file of that name is
    created. A folder that was removed is not created again: the record is lost.

    Args:
        path: The file.
        header: Begins a new file.
    """

    def __init__(self, path: Path, header: Callable[[], bytes] = bytes) -> None:
        self._path = path
        self._header = header
        self._file: io.FileIO | None = None

    def append(self, record: bytes) -> None:
        """Add one record.

        Raises:
            OSError: it cannot be written; the file is unchanged.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_to_append(self._path)
        elif self._file.closed or not self._is_in_place(self._file):
            self._file.close()
            self._file = open_to_append(self._path)
        end = os.fstat(self._file.fileno()).st_size
        if end == 0:
            record = self._header() + record
        try:
            if self._file.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise

    def _is_in_place(self, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class EventFile:
    """One event file of TensorBoard.

    Every method raises OSError if the file cannot be written; the file is then unchanged.

    Args:
        folder: The folder of event files; created if missing.
        purge_step: TensorBoard discards events of earlier files from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._folder = folder
        self._file = Appendable(folder / name, self._header)
        self._purge_step = purge_step

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars, by tag."""
        numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Summary(value=numbers), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text, shown preformatted."""
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        self._add(summary.text(tag, shown), step)

    def image(self, tag: str, image_HWC: npt.NDArray[np.uint8], step: int) -> None:
        """Add an image, uint8 [H, W, 3]."""
        self._add(summary.image(tag, image_HWC, dataformats="HWC"), step)

    def histogram(self, tag: str, values: Distribution, step: int) -> None:
        """Add a histogram of a tensor's elements."""
        limits = np.nan_to_num(values.limits)  # the last may be inf
        self._add(summary.histogram_raw(tag, *values[:5], limits, values.counts), step)

    def layout(self, layout: Layout) -> None:
        """Set the layout of the page "Custom Scalars"."""
        self._add(summary.custom_scalars(layout), 0)

    def hparams(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """Add the run as a row of TensorBoard's HParams table."""
        for part in summary.hparams(dict(settings), dict(results)):
            self._add(part, step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, what: Summary, step: int) -> None:
        if self._folder.parent.exists():
            self._folder.mkdir(exist_ok=True)  # it may have been removed
        self._file.append(_framed(Event(wall_time=time.time(), step=step, summary=what)))

    def _header(self) -> bytes:
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        purge = Event(wall_time=time.time(), step=self._purge_step, session_log=start)
        return _framed(version) + _framed(purge)


def _framed(event: Event) -> bytes:
    """Return the serialized event with its length and checksums (TFRecord)."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
