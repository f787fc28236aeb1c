"""A slow rank among real ones is detected, named, and warned about once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jepa_dist.config import Config
from jepa_dist.monitor.stragglers import RankTimes, StragglerAlarm
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.listeners import SILENT
from tests.support.ranks import run_ranks
from tests.support.runs import Recorder
from tests.support.tiny import tiny_config, write_corpus

SLOW_RANK = 1


class Slow(nn.Module):
    """A region on a slow device."""

    def __init__(self, region: nn.Module, seconds: float) -> None:
        super().__init__()
        self.region = region
        self._seconds = seconds

    def forward(self, *args: Any) -> Any:
        time.sleep(self._seconds)
        return self.region(*args)


def train(rank: int, world_size: int, config: Config, delay: float) -> list[dict[str, Any]]:
    """Train; the slow rank takes ``delay`` seconds more in each forward pass."""
    trainer = build_trainer(config, start_world(config.parallel))
    if delay and rank == SLOW_RANK:
        head = trainer.state.model.head
        head.region = Slow(head.region, delay)
    recorder = Recorder()
    trainer.run(recorder if rank == 0 else SILENT)
    return recorder.records


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_slow_rank_is_named(corpus: Path, world_size: int) -> None:
    config = tiny_config(corpus, train__steps=30, train__log_every=5, batch__micro=6)
    records = run_ranks(train, world_size, config, 0.2, timeout=280)[0]
    compared = [record for record in records if "straggler/ratio" in record]
    assert [record["step"] for record in compared] == [10, 20, 30]  # ten steps at least
    for record in compared:
        assert record["straggler/slowest_rank"] == SLOW_RANK
        assert record["straggler/host"]
        assert record["straggler/ratio"] > 1.3
        highest = (world_size - 1) ** 0.5  # what one outlier among so many can have
        assert record["straggler/zscore"] == pytest.approx(highest, rel=0.1)
    alarm = StragglerAlarm(config.monitor.straggler_ratio)
    warnings = [(r["step"], text) for r in records for text in alarm.observe(r)]
    assert [step for step, _ in warnings] == [30]
    assert f"rank {SLOW_RANK} (host {compared[0]['straggler/host']})" in warnings[0][1]


@pytest.mark.slow
def test_waiting_for_a_slow_rank_is_communication(corpus: Path) -> None:
    config = tiny_config(corpus, train__steps=4, batch__micro=6, train__enable_looping_at=0)
    waited, worked = (
        [r["time/communication"] for r in run_ranks(train, 2, config, delay)[0]]
        for delay in (1.0, 0.0)
    )
    # On a busy machine communication takes longer in both runs, by no known amount.
    assert min(waited) > 0.75
    assert 0 < min(worked[1:]) < min(waited) - 0.5


@pytest.mark.slow
def test_comparing_changes_no_number(corpus: Path) -> None:
    """Equal bit for bit, and no metrics where ranks are not compared."""
    short = {"train__steps": 12, "monitor__jepa_every": 0}
    on = run_ranks(train, 2, tiny_config(corpus, **short), 0.0)[0]
    off = run_ranks(train, 2, tiny_config(corpus, monitor__straggler_ratio=0, **short), 0.0)[0]
    alone = run_ranks(train, 1, tiny_config(corpus, **short), 0.0)[0]
    assert "straggler/ratio" in on[9]
    assert not any("straggler/ratio" in record for record in off + alone)
    for ours, plain in zip(on, off, strict=True):
        for key in ("loss/ce", "loss/total", "grad_norm", "update_ratio/matrix"):
            assert ours[key] == plain[key]


def test_every_rank_sees_the_same_update_ratio(corpus: Path) -> None:
    """Sums over shards equal those of the whole; the sample of the embedding differs slightly."""
    short = {"train__steps": 3, "monitor__jepa_every": 0}
    tolerance = {"tok": 2e-2, "matrix": 1e-3, "scalar": 1e-3}
    one = run_ranks(train, 1, tiny_config(corpus, **short), 0.0)[0]
    three = run_ranks(train, 3, tiny_config(corpus, **short), 0.0)[0]
    for ours, expected in zip(three, one, strict=True):
        for group, rel in tolerance.items():
            key = f"update_ratio/{group}"
            assert ours[key] == pytest.approx(expected[key], rel=rel), key


def test_the_share_of_clipped_steps(corpus: Path) -> None:
    short = {"train__steps": 8, "train__log_every": 1, "monitor__jepa_every": 0}
    norms = [r["grad_norm"] for r in run_ranks(train, 1, tiny_config(corpus, **short), 0.0)[0]]
    limit = sorted(norms)[3]
    config = tiny_config(corpus, optim__grad_clip_norm=limit, **short | {"train__log_every": 4})
    seen = run_ranks(train, 1, config, 0.0)[0]
    assert [record["step"] for record in seen] == [4, 8]
    assert 0 < sum(record["clipped_share"] for record in seen) < 2
    free = run_ranks(train, 1, tiny_config(corpus, optim__grad_clip_norm=0, **short), 0.0)[0]
    assert not any("clipped_share" in record for record in free)


# ------------------------------------------------------------------ by hand


def times(seconds: list[float], steps: int = 10) -> dict[str, Any]:
    ranks = RankTimes(0, [f"node{rank}" for rank in range(len(seconds))], torch.device("cpu"))
    for _ in range(steps):
        ranks.observe({f"compute/rank_{rank}": value for rank, value in enumerate(seconds)})
    return ranks.record()


def test_by_hand() -> None:
    found = times([1.0, 1.0, 1.0, 3.0])
    assert found["straggler/slowest_rank"] == 3
    assert found["straggler/host"] == "node3"
    assert found["straggler/ratio"] == 3.0
    assert found["straggler/zscore"] == pytest.approx(3**0.5)
    assert times([1.0, 2.0])["straggler/ratio"] == 2.0
    assert times([1.0, 1.0])["straggler/zscore"] == 0.0
    assert times([1.0, 2.0], steps=9) == {}
    assert times([1.0, 0.0]) == {}  # a device has not finished its first call yet
    assert times([1.0]) == {}


def test_a_single_slow_record_is_not_a_straggler() -> None:
    ranks = RankTimes(0, ["a", "b"], torch.device("cpu"))
    for step in range(11):
        ranks.observe({"compute/rank_0": 1.0, "compute/rank_1": 50.0 if step == 5 else 1.0})
    assert ranks.record()["straggler/ratio"] == 1.0


def test_warnings_are_rare() -> None:
    alarm = StragglerAlarm(1.3)

    def warns(rank: int, ratio: float) -> bool:
        numbers = {"straggler/slowest_rank": rank, "straggler/ratio": ratio}
        return bool(alarm.observe({"step": 1, "straggler/host": "h", **numbers}))

    assert [warns(1, 2.0) for _ in range(6)] == [False, False, True, False, False, False]
    assert not warns(1, 1.1)
    assert [warns(1, 2.0) for _ in range(3)] == [False, False, True]
    assert [warns(rank, 2.0) for rank in (0, 1, 0, 1)] == [False] * 4  # not the same one
    assert alarm.observe({"step": 1}) == []
    assert not any(
        StragglerAlarm(0.0).observe({"straggler/ratio": 9.0} | {"straggler/slowest_rank": 0})
        for _ in range(5)
    )
