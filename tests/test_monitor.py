"""Plain numbers: compile counting, the digest, rates, the run directory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jepa_dist.errors import UserError
from jepa_dist.monitor.compiles import CompileCounter
from jepa_dist.monitor.hardware import peak_flops
from jepa_dist.monitor.meter import Meter, TokensDigest
from jepa_dist.monitor.run_dir import write_run_dir
from jepa_dist.monitor.writer import MetricsWriter


def test_recompiles_are_graphs_that_nothing_new_explains() -> None:
    counter = CompileCounter()
    counter.observe(5, {"train"})
    counter.observe(5, {"train"})
    counter.observe(6, {"train", "jepa"})
    counter.observe(11, {"train", "jepa", "evaluate"})
    assert counter.recompiles == 0
    counter.observe(13, {"train"})
    assert counter.recompiles == 2


def test_the_digest_sees_every_step_in_order() -> None:
    def digest(*sums: int) -> str:
        rolling = TokensDigest()
        for value in sums:
            rolling.update(value)
        return rolling.hex()

    assert digest(1, 2, 3) == digest(1, 2, 3)
    assert len({digest(1, 2, 3), digest(1, 3, 2), digest(1, 2), digest(0, 1, 2, 3)}) == 4


def test_evaluation_is_not_training_time() -> None:
    meter = Meter(tokens_per_step=1000)
    for _ in range(4):
        meter.step()
    with meter.waiting_for_data():
        time.sleep(0.04)
    with meter.evaluating():
        time.sleep(0.5)
    lap = meter.lap()
    assert 0.04 <= 4 * lap["time/step"] < 0.4
    assert lap["tokens_per_second"] == pytest.approx(1000 / lap["time/step"])
    assert lap["time/data_wait"] <= lap["time/step"]
    assert meter.summary()["seconds"] >= 0.54


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some other device") is None


def test_run_directory(tmp_path: Path) -> None:
    write_run_dir(tmp_path / "run", {"config.yaml": "seed: 1\n"})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_run_dir(tmp_path / "file" / "run", {})


def test_records_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    whole = "".join(lines) + json.dumps({"step": 2, "final": True}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "lo')
    writer = MetricsWriter(tmp_path, step=2)
    writer.write({"step": 3, "loss": 2.0})
    writer.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in kept] == [(1, 1.0), (2, 1.0), (3, 2.0)]
