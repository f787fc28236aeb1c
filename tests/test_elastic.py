"""torchrun's restarts with checkpoints: a killed rank costs steps, but does not end the run."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from jepa_dist.config import load
from tests.support.commands import Command, Finished
from tests.support.ranks import run_ranks
from tests.support.runs import train
from tests.support.tiny import write_corpus
from tests.support.train_command import last_step, records, settings

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
ELASTIC = (
    *(TORCHRUN, "--nnodes=1:1", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.5"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "jepa_dist.train"),
)
# What somebody types; the environment is the user's.
LOOPBACK = (
    *(TORCHRUN, "--rdzv-backend=loopback", "--nproc-per-node=2", "--max-restarts=3"),
    *("-m", "jepa_dist.train"),
)
STEPS = 25


def arguments(corpus: Path, name: str) -> list[str]:
    changes = {"run__dir": corpus / name, "train__steps": STEPS, "checkpoint__every": 5}
    return settings(corpus, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train_tokens=20_000)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> list[dict[str, Any]]:
    config = load(None, arguments(corpus, "undisturbed")[1:], {}).config
    return run_ranks(train, 2, config)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "launcher"), [(0, LOOPBACK), (1, ELASTIC)])
def test_a_killed_rank_costs_work_but_not_the_run(
    corpus: Path, undisturbed: list[dict[str, Any]], victim: int, launcher: tuple[str, ...]
) -> None:
    run_dir = corpus / f"disturbed_{victim}"
    with Command([*launcher, *arguments(corpus, run_dir.name)]) as job:
        job.wait_for(lambda: last_step(run_dir) >= 8, 60)
        job.rank(victim).kill()
        finished: Finished = job.wait(120)
    assert finished.code == 0, finished.output
    assert "resuming from" in finished.output
    ours, expected = records(run_dir), undisturbed[-2] | undisturbed[-1]
    assert [record["step"] for record in ours] == [*range(1, STEPS + 1), STEPS]
    assert ours[-1]["final"] is True
    # At the same world size, bit for bit.
    for key in ("tokens_digest", "loss/total", "val/loss", "grad_norm"):
        assert ours[-1][key] == expected[key], key


@pytest.mark.slow
def test_ranks_die_with_their_agent(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run_dir = tmp_path / "run"
    endless = [*arguments(tmp_path, "run"), "train.steps=1000000"]
    with Command([*ELASTIC, *endless]) as job:
        job.wait_for(lambda: last_step(run_dir) >= 2, 60)
        job.signal(signal.SIGKILL)
        job.wait(30)  # fails if anything is left
