"""Micro-batches of tokens, in an order that does not depend on their readers.

The samples are windows over shards. Which sample is the i-th of the run is a pure function of the
seed (order.py, mixture.py), which rows are a rank's is arithmetic (layout.py), so the loader's only
state is the number of samples consumed: a run resumes at any world size, with any number of loader
processes (world-size invariance).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import multiprocessing.queues
import os
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# np.unique loads it at its first call: here in a thread, while the compiler in the main thread may
# be iterating over numpy's names.
import numpy.ma
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.mixture import Mixture, Stage
from jepa_dist.data.order import Ids
from jepa_dist.data.shards import Shard, check_ids, num_windows, read_count
from jepa_dist.data.workers import become_helper, signals_left_to_parent
from jepa_dist.errors import UserError

# As long as torchrun waits before SIGKILL.
_GRACE_SECONDS = 30.0

# A failed rank must exit instead of waiting for a file that never arrives.
_CLOSE_SECONDS = 5.0

# A process has only about 1,000 file descriptors.
_OPEN_SHARDS = 256

# Forking a process that has CUDA or gloo threads is not safe. A fork server that has imported
# this module starts a worker in milliseconds and shares its memory with all of them.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["jepa_dist.data.fork_server"])


class TokenDataset:
    """Windows of seq_len+1 tokens, at stride seq_len inside each shard, never across shards.

    Cheap to create (headers only) and to pickle, with thousands of shards, too: they are opened
    when first read, a bounded number at a time.

    Args:
        paths: The shards, grouped by source.
        seq_len: T.
        vocab_size: Number of legal ids.
        shards: Number of paths of each source; None: a single source.
        stages: Weights of the sources over the run.

    Raises:
        UserError: a damaged shard, or a source without a single window.
    """

    order: Mixture
    """Order of the windows, which are numbered source by source."""

    def __init__(
        self,
        paths: Sequence[Path],
        seq_len: int,
        vocab_size: int,
        shards: Sequence[int] | None = None,
        stages: Sequence[Stage] = (Stage(0, (1,)),),
    ) -> None:
        self.paths = list(paths)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        counts = [read_count(path) for path in self.paths]
        self.num_tokens = sum(counts)
        windows = [num_windows(count, seq_len) for count in counts]
        self._first_window = np.cumsum([0, *windows])
        ends = np.cumsum([0, *([len(self.paths)] if shards is None else shards)]).tolist()
        sizes = np.diff(self._first_window[ends]).tolist()
        for (first, end), size in zip(itertools.pairwise(ends), sizes, strict=True):
            if size == 0:
                raise UserError(
                    f"{self.paths[first].parent}: {end - first} token shards with "
                    f"{sum(counts[first:end])} tokens hold no window of seq_len + 1 = "
                    f"{seq_len + 1} tokens; use more text or a smaller model.seq_len"
                )
        self.order = Mixture(sizes, stages)
        self._open = functools.lru_cache(_OPEN_SHARDS)(Shard)

    def __len__(self) -> int:
        return int(self._first_window[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = functools.lru_cache(_OPEN_SHARDS)(Shard)

    def read(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the windows with these ids (0..len-1), int64 [len(ids), seq_len+1].

        Raises:
            UserError: a token id outside the vocabulary, or a shard damaged meanwhile.
        """
        shards = np.searchsorted(self._first_window, ids, side="right") - 1
        starts = (np.asarray(ids) - self._first_window[shards]) * self.seq_len
        rows = np.empty((len(shards), self.seq_len + 1), dtype=np.int64)
        for row, shard, start in zip(rows, shards.tolist(), starts.tolist(), strict=True):
            row[:] = self._open(self.paths[shard]).read(start, start + len(row))
        if rows.size and rows.max() >= self.vocab_size:
            for row, shard in zip(rows, shards.tolist(), strict=True):
                check_ids(self.paths[shard], row, self.vocab_size)
        return rows


@dataclass
class Batch:
    """A micro-batch of M rows (padding included) of T tokens.

    tokens, targets: int64 [M, T]; targets are the tokens shifted by one position.
    weight: float32 [M], 1 for a real row, 0 for padding.
    positions: int64 [M], a row's index in the global batch, -1 for padding.
    digest: 64-bit unsigned digest of the real rows' tokens and indices. Digests of micro-batches
        and ranks add up (modulo 2**64) to that of the global batch, at any world size.
    sources: int64 [M], the number of each row's source, -1 for padding; None if there is only one.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    positions: torch.Tensor
    digest: int
    sources: torch.Tensor | None = None
    _sent: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the same batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            change(self.tokens),
            change(self.targets),
            change(self.weight),
            change(self.positions),
            self.digest,
            None if self.sources is None else change(self.sources),
        )

    def share(self) -> Batch:
        """Move the batch to shared memory, to send it to another process.

        If the queue between the processes did this, a full /dev/shm would lose the batch, and the
        reader would wait for it.

        Raises:
            UserError: shared memory is full.
        """
        try:
            self._sent = self._rows().share_memory_()
        except (OSError, RuntimeError) as error:
            raise _no_room(error) from None
        return self

    def _rows(self) -> torch.Tensor:
        """Return tokens and last targets of the real rows, [rows, T+1].

        int16 if all ids fit in uint16 (which cannot be sent), else int32.
        """
        real = int(self.weight.sum())
        rows = torch.cat([self.tokens[:real], self.targets[:real, -1:]], dim=1)
        return rows.to(torch.int16 if not real or int(rows.max()) < 2**16 else torch.int32)

    def __reduce__(self) -> Any:
        # Between processes a batch is one small tensor in shared memory. Sent through the pipe, it
        # would be so long that a process killed while sending leaves the queue locked and its
        # reader waiting forever.
        rows = self._rows() if self._sent is None else self._sent
        sources = None if self.sources is None else self.sources[: len(rows)].tolist()
        return _rebuild, (rows, int(self.positions[0]), len(self.positions), self.digest, sources)


def _no_room(error: Exception) -> UserError:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
    return UserError(
        f"data loader: {reason}: processes exchange batches in /dev/shm ({free >> 10} KiB free) "
        f"and have sockets in {tempfile.gettempdir()}; give them more space (docker --shm-size, "
        "TMPDIR) or more files (ulimit -n), or set data.workers=0"
    )


def _died(error: Exception) -> UserError:
    return UserError(
        f"a data loader process died ({error}): possibly killed because memory or "
        "shared memory (/dev/shm) ran out; give the job more, or lower data.workers"
    )


def make_batch(
    rows: npt.NDArray[np.int64], places: range, size: int, sources: Ids | None = None
) -> Batch:
    """Return a batch of ``size`` rows from ``rows`` int64 [n <= size, T+1] at indices ``places``
    of the global batch; ``sources`` int64 [n] numbers each row's source if there are several."""
    return _assemble(rows, places, size, _digest(rows, places), sources)


def _rebuild(
    rows: torch.Tensor, first_place: int, size: int, digest: int, sources: list[int] | None
) -> Batch:
    tokens = rows.numpy().view(np.uint16 if rows.dtype == torch.int16 else np.uint32)
    places = range(first_place, first_place + len(rows))
    return _assemble(tokens, places, size, digest, sources)


def _assemble(
    rows: npt.NDArray[Any],
    places: range,
    size: int,
    digest: int,
    sources: Ids | list[int] | None,
) -> Batch:
    padded = np.zeros((size, rows.shape[1]), dtype=np.int64)
    padded[: len(rows)] = rows
    positions = np.full(size, -1, dtype=np.int64)
    positions[: len(rows)] = places
    if sources is not None:
        padding = [-1] * (size - len(rows))
        sources = np.concatenate([sources, padding]).astype(np.int64)
    # Copied by numpy: torch would start a second set of threads in this thread.
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(padded[:, :-1])),
        targets=torch.from_numpy(np.ascontiguousarray(padded[:, 1:])),
        weight=torch.from_numpy((positions >= 0).astype(np.float32)),
        positions=torch.from_numpy(positions),
        digest=digest,
        sources=None if sources is None else torch.from_numpy(sources),
    )


def _digest(rows: npt.NDArray[np.int64], places: range) -> int:
    """Return the sum over rows of a hash of (index, tokens): additive, but depends on the order."""
    total = 0
    # The type depends on this row only, so that the digest does not depend on other rows.
    is_narrow = rows.max(axis=1, initial=0) < 2**16
    for place, row, narrow in zip(places, rows, is_narrow.tolist(), strict=True):
        data = place.to_bytes(8, "little") + row.astype("<u2" if narrow else "<u4").tobytes()
        total += int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return total % 2**64


class TrainLoader:
    """An endless iterator over one rank's micro-batches, ``layout.num_micro`` per step.

    Args:
        dataset: The samples.
        layout: The rank's share of each global batch.
        seed: Seed of the order.
        samples_consumed: Where to start, in samples of the whole run (a loader's only state; the
            property of this name counts complete global batches taken).
        skip: Places in the order that the run skips.
        workers: Loader processes; 0 reads in a thread of this one.
        prefetch: Micro-batches that each process keeps ready.
        pin_memory: Return page-locked batches (CUDA only).

    The constructor starts the processes, which fill their queues while the model is built. Use it
    as a context manager, or call ``close``.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        layout: BatchLayout,
        *,
        seed: int,
        samples_consumed: int = 0,
        skip: range = range(0),
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._layout = layout
        self._paths = dataset.paths
        self.order = dataset.order
        self._workers = workers
        self._start = samples_consumed
        self._yielded = 0
        with _quiet_start(), signals_left_to_parent(), _naming_full_storage():
            if workers:  # fail here if shared memory is full: half a loader prints tracebacks
                _context.Lock()
            loader: Any = StatefulDataLoader(
                _Stream(dataset, layout, seed, samples_consumed, skip),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                pin_memory=pin_memory,
                multiprocessing_context=_context if workers else None,
                worker_init_fn=_begin_worker,
                # Its own snapshots depend on the number of workers, so they are not used.
                snapshot_every_n_steps=0,
                # Drawing its seed would advance the global generator of the training process.
                generator=torch.Generator(),
            )
            self._batches: Iterator[Any] | None = iter(loader)
        # Taking a batch from another process costs milliseconds; a thread does it ahead.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: Future[Any] = self._reader.submit(next, self._batches)

    @property
    def samples_consumed(self) -> int:
        """Samples of all complete global batches taken so far, over the whole run."""
        return self._start + self._yielded // self._layout.num_micro * self._layout.sequences

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch.

        Raises:
            UserError: bad data, found in any process, or a process that died.
        """
        if self._batches is None:
            raise ValueError("the loader is closed")
        try:
            item = self._ahead.result()
        except (EOFError, OSError, RuntimeError) as error:  # what a dead process may cause
            self.close()
            if not self._workers:
                raise
            for path in self._paths:
                read_count(path)  # a shard truncated while it is mapped causes a bus error
            raise _died(error) from error
        if isinstance(item, UserError):
            self.close()  # the remaining batches would be out of order
            raise item
        self._ahead = self._reader.submit(next, self._batches)
        self._yielded += 1
        return item

    def close(self) -> None:
        """Stop the thread and the loader processes; those blocked by storage are left running."""
        is_idle = self._ahead.cancel() or bool(wait([self._ahead], timeout=_CLOSE_SECONDS).done)
        self._reader.shutdown(wait=is_idle)
        self._ahead = Future()  # its exception would keep the processes' iterator alive
        self._batches = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream(IterableDataset[Any]):
    """The micro-batches of one loader process: every workers-th one of the rank.

    StatefulDataLoader reads the processes in turn, which restores the order.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        layout: BatchLayout,
        seed: int,
        samples_consumed: int,
        skip: range,
    ) -> None:
        self.dataset, self.layout = dataset, layout
        self.seed, self.samples_consumed, self.skip = seed, samples_consumed, skip

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        try:
            for index in itertools.count(first, stride):
                batch = self._micro_batch(index)
                yield batch.share() if info else batch
        except UserError as error:
            # As a value: the loader would add its own traceback to a raised one.
            yield error

    def _micro_batch(self, index: int) -> Batch:
        step, micro = divmod(index, self.layout.num_micro)
        places = self.layout.micro_rows(micro)
        consumed = self.samples_consumed + step * self.layout.sequences
        ids = self.dataset.order.ids(consumed + places.start, len(places), self.seed, self.skip)
        sources = self.dataset.order.sources_of(ids)
        return make_batch(self.dataset.read(ids), places, self.layout.micro_size, sources)


@contextlib.contextmanager
def _naming_full_storage() -> Iterator[None]:
    """Turn system errors without a file name, while processes are started, into a clear one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise _no_room(error) from None
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise _died(error) from error


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start loader processes without importing the main module, and without torch's warnings.

    Otherwise a new process imports the program's main module again, which takes seconds and fails
    for a script without a guard. Nothing that is sent to the process is defined there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.13 deprecates
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            yield
    finally:
        sys.modules["__main__"] = main


def _begin_worker(_: int) -> None:
    become_helper(outlast_sigterm=_GRACE_SECONDS)
    # By default a batch that cannot be sent is dropped, and the rank hangs.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _: Any) -> None:
    """End this process after an error in the thread that sends its batches."""
    print(f"error: data loader: a batch cannot be sent: {error}", file=sys.stderr, flush=True)
    os._exit(1)
