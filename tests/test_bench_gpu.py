"""bench gpu: every part with toy sizes on the CPU; a failing part does not affect the others."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from jepa_dist.bench import parts_machine
from jepa_dist.bench.child import read_events
from jepa_dist.bench.common import time_interleaved
from jepa_dist.bench.expected import CARDS, Expected
from jepa_dist.bench.gpu import _result, table
from jepa_dist.bench.parts import PARTS, plan
from jepa_dist.bench.parts_machine import slow_ranks
from jepa_dist.bench.parts_trainer import summarize_trace, waits_for_device
from jepa_dist.bench.session import Measured, Session, Settings, Task
from jepa_dist.bench.supervisor import Outcome, Supervisor, meet
from jepa_dist.config import ParallelConfig
from jepa_dist.parallel.world import start_world
from tests.support.commands import TORCHRUN, Command, Finished, command_line_of, environment_of
from tests.support.forked import run_module
from tests.support.patience import patience
from tests.support.ranks import run_ranks
from tests.support.tiny import REPOSITORY

CPU = torch.device("cpu")
GPU = ("-m", "jepa_dist.bench", "gpu")
CONFIG = "configs/gpt_36m.yaml"
CONFIGS = [CONFIG, "configs/gpt_1b.yaml"]
EAGER = ("--config", CONFIG, "--set", "parallel.compile=false", "data.workers=0")
SMALL = Settings(("parallel.compile=false", "data.workers=0"), small=True, ranks=1)


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    return {f"{row['task']}: {row['figure']}": row["value"] for row in result["figures"]}


def statuses(result: Mapping[str, Any]) -> dict[str, str]:
    return {outcome["task"]: outcome["status"] for outcome in result["outcomes"]}


# ------------------------------------------------------------------ what is measured


def test_parts_by_number_of_ranks() -> None:
    alone = [task.label for tasks in plan(list(PARTS), CONFIGS, 1) for task in tasks]
    assert len(alone) == len(set(alone))
    assert {"step gpt_36m", "step gpt_1b", "floor gpt_36m", "copies"} < set(alone)
    several_only = {"stragglers", "bandwidth", "hsdp gpt_36m"}
    assert not several_only & set(alone)
    together = plan(list(PARTS), CONFIGS, 8)
    assert {task.label for tasks in together for task in tasks} == {*alone, *several_only}
    for tasks in together:
        # Trainers of two configurations do not share a device's memory.
        kinds = {PARTS[task.part].process for task in tasks}
        assert kinds == {"machine"} or len({task.config for task in tasks}) == 1
    assert plan(["floor", "step"], [CONFIG], 3) == [[Task("step", CONFIG)], [Task("floor", CONFIG)]]


def test_a_batch_is_two_micro_batches_per_rank() -> None:
    full = Settings((), small=False, ranks=4).config(CONFIG)
    assert (full.batch.sequences, full.batch.micro, full.model.num_layers) == (2 * 48 * 4, 48, 11)
    changed = Settings(("batch.micro=3",), small=False, ranks=4).config(CONFIG)
    assert changed.batch.sequences == 2 * 3 * 4
    chosen = Settings(("batch.sequences=7",), small=True, ranks=4).config(CONFIG)
    assert chosen.batch.sequences == 7
    assert chosen.model.num_loops == full.model.num_loops  # the same kinds of blocks
    assert chosen.model.model_dim < 100


def test_where_a_step_waits_for_the_device() -> None:
    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (here,) = waits_for_device(wait, CPU)
    assert here == f"{__file__}:{wait.__code__.co_firstlineno + 1}"
    # For a call from the package, its own line is reported, not that of the callee.
    (within,) = waits_for_device(lambda: time_interleaved({"wait": wait}, 1, CPU), CPU)
    name, _, line = within.partition(":")
    source = (REPOSITORY / "jepa_dist" / name).read_text().splitlines()
    assert source[int(line) - 1].strip() == "call()"


def test_a_trace_is_summarized() -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "dur": 1500.0},
        {"cat": "kernel", "name": "add", "dur": 4000.0},
        {"cat": "kernel", "name": "gemm", "dur": 500.0},
        {"cat": "gpu_user_annotation", "name": "forward", "dur": 9000.0},
        {"cat": "overhead", "name": "Command Buffer Full", "dur": 250.0},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 7.0},
        {"ph": "M", "name": "process_name"},
    ]
    found = summarize_trace({"traceEvents": events})
    assert found["kernels"] == 3
    assert found["kernel_ms"] == pytest.approx(6.0)
    assert found["queue_full_ms"] == pytest.approx(0.25)
    assert found["longest"] == [
        {"name": "add", "ms": 4.0, "count": 1},
        {"name": "gemm", "ms": 2.0, "count": 2},
    ]


def _collectives(rank: int, world_size: int, folder: Path) -> tuple[float, str]:
    session = Session(start_world(ParallelConfig()), SMALL, folder)
    seconds = parts_machine.collectives(session).figures["all of them s"]
    plain = dist.all_reduce
    dist.all_reduce = lambda *_, **__: None
    try:
        parts_machine.collectives(session)
    except RuntimeError as error:
        return seconds, str(error)
    finally:
        dist.all_reduce = plain
    return seconds, "nothing found"


@pytest.mark.slow
def test_collectives_are_checked(tmp_path: Path) -> None:
    for rank, (seconds, problem) in enumerate(run_ranks(_collectives, 3, tmp_path)):
        assert 0 < seconds < 60
        mine = [float(rank)] * 3
        assert problem == f"all_reduce: got {mine}, expected [3.0, 3.0, 3.0]"


def test_slow_ranks_are_named() -> None:
    assert slow_ranks([700.0, 690.0, 705.0, 640.0]) == []
    (line,) = slow_ranks([700.0, 690.0, 705.0, 600.0])
    assert line.startswith("rank 3: matmul at 600 TFLOP/s, 86% of the median 695")


# ------------------------------------------------------------------ what is expected


@pytest.mark.parametrize(
    ("is_more_better", "verdicts"),
    [(True, ("OFF", "ok", "better")), (False, ("better", "ok", "OFF"))],
)
def test_verdicts(is_more_better: bool, verdicts: tuple[str, ...]) -> None:
    expected = Expected(10, 20, is_more_better)
    assert tuple(expected.verdict(value) for value in (9, 15, 21)) == verdicts
    assert expected.verdict(math.nan) == "OFF"


def test_expected_figures_are_of_parts_that_exist() -> None:
    for card in CARDS.values():
        for key, expected in card.figures.items():
            part, _, rest = key.partition(": ")[0].partition(" ")
            assert PARTS[part].configs == "none" or rest in ("gpt_36m", "gpt_1b"), key
            assert expected.low < expected.high, key


def outcomes() -> list[Outcome]:
    speeds = {"tokens/s": 0.9e6, "MFU of step %": 50.0, "first step s": 9.0}
    return [
        Outcome(Task("copies"), "ok", 3.0, measured=Measured({"copy GB/s": 4000.0})),
        Outcome(
            Task("step", CONFIG), "ok", 9.0, measured=Measured(speeds, off=["a step waits at x:1"])
        ),
        Outcome(Task("jepa", CONFIG), "failed", 1.0, "RuntimeError: no luck", log=["a", "b"]),
        Outcome(Task("floor", CONFIG), "left out", reason="no time left"),
    ]


def judged(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    result = _result(outcomes(), settings, [CONFIG])
    json.dumps(result)
    return result


def test_each_deviation_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = judged(monkeypatch, Settings((), small=False, ranks=1))
    assert result["off"] == [
        "step gpt_36m: a step waits at x:1",
        "jepa gpt_36m: failed: RuntimeError: no luck",
        "step gpt_36m: tokens/s 900,000; expected 1,000,000 to 1,300,000 (NVIDIA H200, measured)",
    ]
    shown = table(result)
    assert "| copies | copy GB/s | 4,000 | 3,900 to 4,500 | ok |" in shown
    assert "| step gpt_36m | MFU of step % | 50 | 36 to 46 | better |" in shown
    assert "floor gpt_36m: left out: no time left" in shown
    assert "3 finding(s)" in shown


@pytest.mark.parametrize(
    "settings",
    [Settings(("optim.matrix=adamw",), False, 1), Settings((), False, 8)],
    ids=["changed", "several ranks"],
)
def test_incomparable_results_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    result = judged(monkeypatch, settings)
    assert [row["verdict"] for row in result["figures"]] == ["ok", "", "", ""]


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_only_the_hanging_part_is_lost(tmp_path: Path) -> None:
    """A process that hangs is killed at the part's time limit, and another one continues."""
    tasks = [Task("collectives"), Task("copies"), Task("launches")]
    reported: list[Outcome] = []
    # Limits: 90 s to start, 60 s for copies.
    supervisor = Supervisor(meet(), SMALL, tmp_path, 600.0, patience=1.0, report=reported.append)

    def stop_during_copies() -> None:
        deadline = time.monotonic() + patience(60)
        events = tmp_path / "rank_0" / "events_1.jsonl"
        while time.monotonic() < deadline:
            if [e["task"] for e in read_events(events)][-1:] == [["copies", None]]:
                (child,) = (
                    process
                    for process in psutil.Process().children()
                    if "jepa_dist.bench.child" in command_line_of(process)
                )
                child.send_signal(signal.SIGSTOP)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=stop_during_copies)
    thread.start()
    found = supervisor.run(tasks)
    thread.join()
    assert found == reported
    assert [(o.task.part, o.status) for o in found] == [
        ("collectives", "ok"),
        ("copies", "failed"),
        ("launches", "ok"),
    ]
    assert found[1].reason == "it took more than 60 s"


def test_parts_without_remaining_time_are_left_out(tmp_path: Path) -> None:
    supervisor = Supervisor(meet(), SMALL, tmp_path, 5.0, patience=1.0, report=lambda _: None)
    (outcome,) = supervisor.run([Task("launches")])
    assert (outcome.status, outcome.reason) == ("left out", "no time left")


def bench(
    folder: Path, *parts: str, command: tuple[str, ...] = (sys.executable,), **options: Any
) -> tuple[Finished, dict[str, Any]]:
    report = folder / "result.json"
    arguments = (*GPU, *EAGER, *options.get("more", ()), "--dir", folder, "--json", report)
    with Command([*command, *arguments, "--parts", *parts]) as running:
        options.get("meanwhile", lambda _: None)(running)
        finished = running.wait(800)
    return finished, json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_with_toy_sizes(tmp_path: Path) -> None:
    finished, result = bench(tmp_path, *PARTS)
    assert finished.code == 0, finished.output
    assert result["off"] == []
    assert set(statuses(result).values()) == {"ok"}
    assert len(statuses(result)) == len(PARTS) - 3
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]  # nothing is left behind
    found, tokens = figures(result), 4 * 64
    milliseconds = found["step gpt_36m: step ms"]
    assert found["step gpt_36m: tokens/s"] == pytest.approx(1e3 * tokens / milliseconds)
    assert found["step gpt_36m: waits for the device"] == 0
    assert f"| step gpt_36m | step ms | {milliseconds:.4g} |" in finished.output
    assert found["floor gpt_36m: trainer / floor, time ratio"] > 0
    assert found["copies: compiled kernel GB/s"] > 0
    by_task = {o["task"]: o["measured"]["details"] for o in result["outcomes"]}
    assert by_task["step gpt_36m"]["tokens_per_step"] == tokens
    assert by_task["step gpt_36m"]["phases_ms"]["time/forward"] > 0
    first, second = by_task["checkpoint gpt_36m"]["saves"]
    assert first["gigabytes"] == pytest.approx(second["gigabytes"], rel=0.01)
    assert by_task["jepa gpt_36m"]["off"]["new_graphs"] == 0
    assert by_task["newton_schulz gpt_36m"]["count"] == 3 * 6
    products = by_task["matrices gpt_36m"]
    assert products["block fc forward"]["tflop"] == pytest.approx(2 * 128 * 64 * 256 / 1e12)
    assert products["head chunk forward"]["tflop"] == pytest.approx(2 * 128 * 64 * 1024 / 1e12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_dies_under_torchrun_fails_only_its_part(tmp_path: Path) -> None:
    def kill_rank_1_in_the_second_process(running: Command) -> None:
        def training() -> list[psutil.Process]:
            return [
                process
                for process in running.processes()
                if "jepa_dist.bench.child" in command_line_of(process)
                and environment_of(process).get("RANK") == "1"
                and any(e["kind"] == "begin" and e["task"][0] == "step" for e in events())
            ]

        def events() -> list[Mapping[str, Any]]:
            paths = tmp_path.glob("jepa_dist_bench_*/rank_1/events_*.jsonl")
            return [event for path in paths for event in read_events(path)]

        running.wait_for(lambda: bool(training()), 240)
        training()[0].kill()

    parts = ("collectives", "stragglers", "bandwidth", "step", "checkpoint", "hsdp")
    finished, result = bench(
        tmp_path, *parts, command=TORCHRUN, meanwhile=kill_rank_1_in_the_second_process
    )
    assert finished.code == 1, finished.output
    ended = statuses(result)
    assert ended.pop("step gpt_36m") == "failed"
    assert set(ended.values()) == {"ok"}, ended
    assert len(ended) == 5
    (off,) = result["off"]
    assert off == "step gpt_36m: failed: rank 1: the process died with SIGKILL"
    assert f"problem: {off}" in finished.output
    found = figures(result)
    assert found["hsdp gpt_36m: worst difference of losses %"] < 0.1
    assert found["stragglers: matmul, slowest of median"] > 0
    by_bytes = result["outcomes"][2]["measured"]["details"]["by_bytes"]
    row = by_bytes["all_reduce"]["1048576"]
    assert row["GB/s"] == pytest.approx(2 * (1 - 1 / 2) * 2**20 / row["ms"] / 1e6)


def test_user_errors_are_reported() -> None:
    changes = ("--set", "parallel.dp_replicate=2", "--dir", "/does/not/exist", "--minutes", -1)
    finished = run_module("jepa_dist.bench", "gpu", "--config", CONFIG, CONFIG, *changes)
    assert finished.code == 2
    assert "Traceback" not in finished.output
    for problem in (
        "two files named gpt_36m",
        "their product must be the world size 1",
        "/does/not/exist: not a folder",
        "--minutes -1: must be above 0",
    ):
        assert problem in finished.output
