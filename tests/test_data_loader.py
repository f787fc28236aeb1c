from __future__ import annotations

import multiprocessing.forkserver
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.support.ranks  # noqa: F401 (its modules shall be in the fork server, which both share)
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch, TokenDataset, TrainLoader, make_batch
from jepa_dist.data.shards import write_shard
from jepa_dist.errors import UserError
from tests.support.commands import TAG, run_command, tagged_processes
from tests.support.patience import patience, wait_until

SEQ_LEN = 8
VOCAB = 1000


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Shards of uneven sizes, one too small for a window, one with a window exactly."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for i, size in enumerate([200, SEQ_LEN, SEQ_LEN + 1, 0, 333, SEQ_LEN * 5 + 1]):
        write_shard(folder / f"train_{i}.bin", rng.integers(0, VOCAB, size))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def dataset(paths: list[Path]) -> TokenDataset:
    return TokenDataset(paths, SEQ_LEN, VOCAB)


def all_windows(paths: list[Path]) -> list[list[int]]:
    """Return every window, read by the file format alone."""
    windows = []
    for path in paths:
        tokens = np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()
        start = 0
        while start + SEQ_LEN + 1 <= len(tokens):
            windows.append(tokens[start : start + SEQ_LEN + 1])
            start += SEQ_LEN
    return windows


def take(loader: TrainLoader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def global_batches(
    dataset: TokenDataset,
    world_size: int,
    micro: int,
    steps: int,
    sequences: int = 12,
    workers: int = 0,
    start: int = 0,
) -> tuple[list[list[list[int]]], list[int]]:
    """Return the rows of each step's global batch in order, and its digest, from all ranks."""
    rows: list[dict[int, list[int]]] = [{} for _ in range(steps)]
    digests = [0] * steps
    for rank in range(world_size):
        layout = BatchLayout(sequences, micro, rank, world_size)
        loader = TrainLoader(dataset, layout, seed=7, samples_consumed=start, workers=workers)
        batches = take(loader, steps * layout.num_micro)
        for i, batch in enumerate(batches):
            step = i // layout.num_micro
            digests[step] = (digests[step] + batch.digest) % 2**64
            assert batch.tokens.shape == (layout.micro_size, SEQ_LEN)
            for row in range(layout.micro_size):
                place = int(batch.positions[row])
                assert batch.weight[row] == (place >= 0)
                if place >= 0:
                    assert place not in rows[step]
                    rows[step][place] = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
                    assert batch.targets[row, :-1].tolist() == batch.tokens[row, 1:].tolist()
    assert all(sorted(step) == list(range(sequences)) for step in rows)
    return [[step[place] for place in range(sequences)] for step in rows], digests


# ---------------------------------------------------------------------------- the data set


def test_windows_stay_inside_their_shard(dataset: TokenDataset, paths: list[Path]) -> None:
    assert dataset.read(range(len(dataset))).tolist() == all_windows(paths)
    assert dataset.num_tokens == 200 + 8 + 9 + 333 + 41
    assert dataset.read([]).shape == (0, SEQ_LEN + 1)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_ids_in_any_order(
    dataset: TokenDataset, paths: list[Path], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=20))
    windows = all_windows(paths)
    assert dataset.read(ids).tolist() == [windows[i] for i in ids]


@pytest.mark.slow
def test_thousands_of_shards_need_few_file_handles(tmp_path: Path) -> None:
    for i in range(1500):
        write_shard(tmp_path / f"{i:04d}.bin", np.full(2 * SEQ_LEN + 1, i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        dataset = TokenDataset(sorted(tmp_path.iterdir()), SEQ_LEN, 1500)
        ids = np.random.default_rng(0).permutation(len(dataset))
        assert np.array_equal(dataset.read(ids)[:, 0], ids // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(pickle.dumps(dataset)) < 300_000
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).read([2999]), dataset.read([2999]))


def test_an_id_outside_the_vocabulary_names_file_and_id(tmp_path: Path) -> None:
    write_shard(tmp_path / "good.bin", np.arange(50))
    write_shard(tmp_path / "odd.bin", np.array([*range(20), 99, *range(20)]))
    dataset = TokenDataset(sorted(tmp_path.iterdir()), SEQ_LEN, 99)
    with pytest.raises(UserError, match=r"odd\.bin: holds token id 99, but model\.vocab_size=99"):
        dataset.read(range(len(dataset)))


def test_too_little_text_for_one_window(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(SEQ_LEN))
    with pytest.raises(UserError, match=r"1 token shards with 8 tokens hold no window .* = 9"):
        TokenDataset([tmp_path / "a.bin"], SEQ_LEN, VOCAB)


# ------------------------------------------------------------------ world-size invariance


def test_global_batches_do_not_depend_on_ranks_or_micro_batches(dataset: TokenDataset) -> None:
    expected = global_batches(dataset, world_size=1, micro=12, steps=10)
    for world_size in (1, 2, 3, 4):
        for micro in (1, 2, 3, 4, 5, 12, 100):
            assert global_batches(dataset, world_size, micro, steps=10) == expected


def test_uneven_batches_are_exact(dataset: TokenDataset) -> None:
    expected = global_batches(dataset, 1, 7, steps=3, sequences=7)
    for world_size in (2, 3, 4, 7):
        for micro in (1, 2, 3):
            assert global_batches(dataset, world_size, micro, 3, sequences=7) == expected


def test_an_epoch_visits_every_window_once(dataset: TokenDataset, paths: list[Path]) -> None:
    steps = -(-3 * len(dataset) // 12)
    batches, _ = global_batches(dataset, world_size=3, micro=2, steps=steps)
    rows = [row for batch in batches for row in batch]
    epochs = [rows[e * len(dataset) : (e + 1) * len(dataset)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(all_windows(paths))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.timeout(60)
def test_resuming_at_another_world_size_continues_the_order(dataset: TokenDataset) -> None:
    """4 -> 3 -> 1 -> 2 ranks with changing numbers of loader processes."""
    expected, digests = global_batches(dataset, 1, 12, steps=12)
    start = 0
    for world_size, workers, steps in ((4, 0, 3), (3, 1, 4), (1, 2, 3), (2, 0, 2)):
        batches, sums = global_batches(
            dataset, world_size, 2, steps, workers=workers, start=start * 12
        )
        assert batches == expected[start : start + steps]
        assert sums == digests[start : start + steps]
        start += steps


def test_samples_consumed_counts_whole_global_batches(dataset: TokenDataset) -> None:
    layout = BatchLayout(12, 2, 1, 2)
    loader = TrainLoader(dataset, layout, seed=7, samples_consumed=24)
    seen = []
    for _ in range(7):
        seen.append(loader.samples_consumed)
        next(loader)
    assert seen == [24, 24, 24, 36, 36, 36, 48]


# ---------------------------------------------------------------------------- the digest


def test_digest_sees_order_and_content() -> None:
    rows = np.arange(27).reshape(3, 9)
    seen = {make_batch(rows, range(3), 3).digest, make_batch(rows, range(1, 4), 3).digest}
    seen.add(make_batch(rows[::-1], range(3), 3).digest)
    changed = rows.copy()
    changed[1, 8] += 1
    seen.add(make_batch(changed, range(3), 3).digest)
    assert len(seen) == 4
    assert all(0 <= digest < 2**64 for digest in seen)


def test_digest_adds_up_over_any_split_and_ignores_padding() -> None:
    rows = np.arange(27).reshape(3, 9)
    whole = make_batch(rows, range(3), 3).digest
    parts = [make_batch(rows[:1], range(1), 4), make_batch(rows[1:], range(1, 3), 4)]
    assert sum(part.digest for part in parts) % 2**64 == whole
    assert make_batch(rows[:0], range(0), 2).digest == 0


def test_padding_is_legal_and_weightless() -> None:
    batch = make_batch(np.full((1, 9), 5), range(6, 7), 3)
    assert batch.weight.tolist() == [1, 0, 0]
    assert batch.positions.tolist() == [6, -1, -1]
    assert batch.tokens[1:].eq(0).all()
    assert batch.targets[1:].eq(0).all()
    dtypes = [t.dtype for t in (batch.tokens, batch.targets, batch.weight, batch.positions)]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()


def test_a_batch_moves_and_pickles_whole() -> None:
    rows = np.arange(65_518, 65_536).reshape(2, 9)
    for batch in (make_batch(rows, range(4, 6), 3), make_batch(rows[:0], range(0), 2)):
        assert batch.to("meta").tokens.is_meta
        copy = pickle.loads(pickle.dumps(batch))
        assert copy.digest == batch.digest
        for name in ("tokens", "targets", "weight", "positions"):
            assert torch.equal(getattr(copy, name), getattr(batch, name))
        copy.tokens[0, 0] = 3  # writable, as torch expects


@pytest.mark.gpu
def test_pinned_batches(dataset: TokenDataset) -> None:
    for workers in (0, 1):
        layout = BatchLayout(12, 4, 0, 1)
        with TrainLoader(dataset, layout, seed=7, workers=workers, pin_memory=True) as loader:
            batch = next(loader)
        assert batch.tokens.is_pinned()
        assert batch.positions.is_pinned()
        assert batch.to("cuda", non_blocking=True).targets.is_cuda


# ---------------------------------------------------------------------------- threads


def test_reading_adds_no_names_to_numpy(paths: list[Path]) -> None:
    """The compiler iterates over numpy's names while a thread reads the first batch."""
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import numpy
        from jepa_dist.data.layout import BatchLayout
        from jepa_dist.data.loader import TokenDataset, TrainLoader

        names = set(vars(numpy))
        dataset = TokenDataset([Path(path) for path in sys.argv[1:]], {SEQ_LEN}, {VOCAB})
        with TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7) as loader:
            next(loader)
        print(sorted(set(vars(numpy)) - names))
    """)
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------- processes


@pytest.fixture
def no_process_left() -> Iterator[None]:
    yield
    wait_until(lambda: not multiprocessing.active_children(), 10, multiprocessing.active_children)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_loader_processes_do_not_touch_the_random_generators(dataset: TokenDataset) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate()
    take(TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7, workers=2), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_shard_raises_its_own_message(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "a.bin", np.arange(SEQ_LEN * 20 + 1) % 50)
    write_shard(tmp_path / "b.bin", np.full(SEQ_LEN + 1, 60))
    dataset = TokenDataset(sorted(tmp_path.iterdir()), SEQ_LEN, 51)
    loader = TrainLoader(dataset, BatchLayout(4, 2, 0, 1), seed=7, workers=workers)
    with pytest.raises(UserError) as error:
        take(loader, 12)
    with pytest.raises(ValueError, match="closed"):  # never continues after a missing batch
        next(loader)
    assert error.value.problems[0].startswith(f"{tmp_path / 'b.bin'}: holds token id 60")
    assert "Traceback" not in str(error.value)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_a_deleted_shard_raises_its_own_message(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(100))
    dataset = TokenDataset([tmp_path / "a.bin"], SEQ_LEN, 100)
    (tmp_path / "a.bin").unlink()
    loader = TrainLoader(dataset, BatchLayout(4, 2, 0, 1), seed=7, workers=1)
    with loader, pytest.raises(UserError, match=r"a\.bin: cannot read the token shard"):
        next(loader)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_a_killed_loader_process_is_an_error_not_a_hang(tmp_path: Path) -> None:
    """Big batches and full queues: the moment when a process is most likely to be killed."""
    write_shard(tmp_path / "a.bin", np.arange(200_000) % VOCAB)
    dataset = TokenDataset([tmp_path / "a.bin"], 2048, VOCAB)
    before = set(multiprocessing.active_children())
    loader = TrainLoader(dataset, BatchLayout(64, 32, 0, 1), seed=7, workers=2, prefetch=3)
    next(loader)
    time.sleep(0.5)
    worker = (set(multiprocessing.active_children()) - before).pop()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data loader process died .* lower data\.workers"):
        take(loader, 50)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_loader_processes_ignore_stop_signals(dataset: TokenDataset) -> None:
    """scancel --signal=USR1 and Ctrl-C reach them too; the trainer still needs batches then."""
    before = set(multiprocessing.active_children())
    with TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7, workers=2, prefetch=1) as loader:
        for worker in set(multiprocessing.active_children()) - before:
            for number in (signal.SIGINT, signal.SIGUSR1):
                os.kill(worker.pid or 0, number)
        for _ in range(30):
            next(loader)


def test_a_closed_loader_raises(dataset: TokenDataset) -> None:
    loader = TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_closing_does_not_wait_for_storage_that_hangs(dataset: TokenDataset) -> None:
    before = set(multiprocessing.active_children())
    loader = TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7, workers=1, prefetch=1)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid or 0, signal.SIGSTOP)
    try:
        while futures.wait([loader._ahead], timeout=0.5).done:
            next(loader)  # what was ready
        loader.close()
    finally:
        os.kill(worker.pid or 0, signal.SIGCONT)


SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from jepa_dist.data.layout import BatchLayout
    from jepa_dist.data.loader import TokenDataset, TrainLoader

    dataset = TokenDataset([Path(sys.argv[1])], 8, 1000)
    loader = TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7, workers=2)
    next(loader)
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


def wait_until_gone(marker: str, seconds: float) -> None:
    wait_until(
        lambda: not tagged_processes(marker), seconds, lambda: f"left: {tagged_processes(marker)}"
    )


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "how", ["exit without close", signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
)
def test_no_loader_process_outlives_its_trainer(
    paths: list[Path], tmp_path: Path, how: signal.Signals | str
) -> None:
    """Also of a script without a __main__ guard: its module is not imported again."""
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(SCRIPT))
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    mode = "go" if isinstance(how, str) else "wait"
    process = subprocess.Popen(
        [sys.executable, script, paths[0], mode],
        env={**os.environ, TAG: marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if isinstance(how, signal.Signals):
            assert len(tagged_processes(marker)) >= 4  # trainer, fork server, two loaders
            process.send_signal(how)
        process.wait(20)
        wait_until_gone(marker, 10)
        if how == "exit without close":
            assert process.returncode == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
    finally:
        for left in tagged_processes(marker):
            left.kill()


@pytest.mark.slow
def test_a_loader_process_has_its_imports_at_its_start_and_never_collects_them() -> None:
    code = """
        import gc, multiprocessing
        import jepa_dist.data.loader

        imported = "'jepa_dist.data.loader' in __import__('sys').modules"
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            print(pool.apply(eval, (imported,)), pool.apply(gc.get_freeze_count))
    """
    done = run_command(sys.executable, "-c", textwrap.dedent(code), timeout=60)
    imported, frozen = done.output.split()
    assert imported == "True"
    assert int(frozen) > 100_000


def test_batches_and_their_digests_hold_ids_above_16_bits() -> None:
    ids = np.array([[70_000, 1, 2], [3, 4, 65_535], [131_071, 65_536, 0]])
    batch = make_batch(ids, range(5, 8), 4)
    sent = pickle.loads(pickle.dumps(batch))
    assert sent.tokens[:3].tolist() == ids[:, :-1].tolist()
    assert sent.targets[:3].tolist() == ids[:, 1:].tolist()
    alone = [make_batch(ids[i : i + 1], range(5 + i, 6 + i), 1).digest for i in range(3)]
    assert sent.digest == batch.digest == sum(alone) % 2**64
    assert make_batch(ids % 2**16, range(5, 8), 4).digest != batch.digest


class Unsendable(TokenDataset):
    """A dataset that yields an object that cannot be pickled."""

    def read(self, ids: Any) -> NoReturn:
        error = UserError("x")
        error.__dict__["unsendable"] = lambda: None
        raise error


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_process_left")
def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang(paths: list[Path]) -> None:
    dataset = Unsendable(paths, SEQ_LEN, VOCAB)
    loader = TrainLoader(dataset, BatchLayout(12, 4, 0, 1), seed=7, workers=1)
    with pytest.raises(UserError, match="a data loader process died"):
        next(loader)
