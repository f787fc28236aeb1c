"""``python -m jepa_dist.train`` as a user starts it: alone, under torchrun, and when it fails."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_dist.config import load
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.order import sample_order
from jepa_dist.data.shards import find_shards, num_windows, read_count
from tests.support.commands import TORCHRUN, TRAIN, Command, Finished, listening, run_command
from tests.support.forked import run_module
from tests.support.patience import patience, wait_until
from tests.support.tiny import write_corpus
from tests.support.train_command import UNDER_TORCHRUN, has_logged, records, settings

OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# Far less than parallel.timeout_seconds, after which a hanging collective would end the job.
SOON = patience(30.0)


def stands_still(run_dir: Path, seconds: float = 1.0) -> bool:
    before = len(records(run_dir))
    time.sleep(seconds)
    return len(records(run_dir)) == before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


SHORT = {"train__steps": 9, "train__log_every": 2, "eval__every": 4}


@pytest.fixture(scope="module")
def run_dir(corpus: Path) -> Path:
    return corpus / "alone"


@pytest.fixture(scope="module")
def alone(corpus: Path, run_dir: Path) -> Finished:
    """A run without torchrun."""
    return run_command(*TRAIN, *settings(corpus, run__dir=run_dir, **SHORT))


# ---------------------------------------------------------------------------- runs that succeed


def test_without_torchrun(alone: Finished, run_dir: Path) -> None:
    assert alone.code == 0, alone.output
    final = records(run_dir)[-1]
    for message in (
        f"{final['val/loss']:.4f} nats per token, {final['val/bpb']:.4f} bits per byte",
        f"bigram {final['baseline/bigram_bpb']:.4f}, trigram {final['baseline/trigram_bpb']:.4f}",
        f"{final['tokens_per_second']:,.0f} tokens/s",
        f"run directory: {run_dir}",
    ):
        assert message in alone.output
    assert "Warning" not in alone.output


def test_the_tensorboard_command_can_be_pasted(alone: Finished, run_dir: Path) -> None:
    (line,) = [line for line in alone.output.splitlines() if line.startswith("watch it: ")]
    program, option, folder = shlex.split(line.removeprefix("watch it: "))
    assert (option, folder) == ("--logdir", str(run_dir.parent))
    assert run_command(program, "--version", cwd=Path("/")).code == 0


def test_run_directory(alone: Finished, corpus: Path, run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "data.json", "metrics.jsonl", "tensorboard", "logs"} <= names
    given = load(None, settings(corpus, run__dir=run_dir, **SHORT)[1:], {}).config
    assert load(run_dir / "config.yaml", environ={}).config == given
    fingerprint = json.loads((run_dir / "data.json").read_text())
    assert fingerprint["train"]["tokens"] == 6777


def test_values_chosen_at_the_start_are_printed_and_recorded(
    alone: Finished, run_dir: Path
) -> None:
    assert "attention kernel: flash (parallel.attention=auto)" in alone.output
    (start,) = map(json.loads, (run_dir / "starts.jsonl").read_text().splitlines())
    assert start["facts"]["parallel.attention"] == "flash"
    assert "TORCHINDUCTOR_COMPILE_THREADS" in start["environment"]
    assert any(name in start["environment"] for name in ("PYTORCH_ALLOC_CONF", OLD_ALLOCATOR))


@pytest.mark.slow
def test_a_kernel_that_the_device_lacks_is_refused(corpus: Path) -> None:
    settings_of_cudnn = settings(corpus, run__dir=corpus / "x", parallel__attention="cudnn")
    finished = run_module("jepa_dist.train", *settings_of_cudnn)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith("error: parallel.attention=cudnn: cannot run on the CPU")


def test_metrics(alone: Finished, run_dir: Path) -> None:
    *steps, final = records(run_dir)
    # What is logged: every second step, where there is a validation (every fourth), and the end.
    assert [record["step"] for record in steps][-1] == 9
    assert {2, 4, 6, 8} <= {record["step"] for record in steps}
    assert [record["step"] for record in steps if "val/bpb" in record] == [4, 8, 9]
    for record in steps:
        for key in ("loss/ce", "loss/jepa", "loss/total", "grad_norm", "tokens_per_second"):
            assert 0 < record[key] < math.inf, key
        assert record["loss/total"] == pytest.approx(record["loss/ce"] + 0.1 * record["loss/jepa"])
        assert len(record["tokens_digest"]) == 32
        assert record["compile/graphs"] == 0  # the tiny recipe is not compiled
    assert len({record["tokens_digest"] for record in steps}) == len(steps)
    assert final["final"] is True
    assert not any("final" in record for record in steps)
    for key in ("step", "val/loss", "val/bpb", "tokens_digest"):
        assert final[key] == steps[-1][key]
    assert final["val/bpb"] == pytest.approx(final["val/loss"] / math.log(2), rel=1e-6)
    for name in ("bigram", "trigram"):
        assert 0 < final[f"baseline/{name}_bpb"] < 8


def test_tensorboard_shows_the_same_numbers(alone: Finished, run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in records(run_dir)[:-1]:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                expected.setdefault(key, []).append((record["step"], value))
    assert set(board.Tags()["scalars"]) == set(expected)
    for key, points in expected.items():
        shown = board.Scalars(key)
        assert [event.step for event in shown] == [step for step, _ in points]
        assert [event.value for event in shown] == pytest.approx([v for _, v in points], rel=1e-6)
    assert "seed: 0" in str(board.Tensors("config/text_summary")[0].tensor_proto)


@pytest.mark.slow
def test_two_ranks_equal_one_process(alone: Finished, corpus: Path, run_dir: Path) -> None:
    other = corpus / "two"
    # Also through a switch in the environment, with the tiny recipe's own value.
    arguments = [
        argument
        for argument in settings(corpus, run__dir=other, data__workers=1, **SHORT)
        if not argument.startswith("jepa.lambda=")
    ]
    finished = run_command(*UNDER_TORCHRUN, *arguments, environ={"JEPA_LAMBDA": 0.1})
    assert finished.code == 0, finished.output
    assert finished.output.count("run directory:") == 1, "not printed by rank 0 only"
    ours, reference = records(other), records(run_dir)
    assert [record["step"] for record in ours] == [record["step"] for record in reference]
    for record, expected in zip(ours, reference, strict=True):
        assert record["tokens_digest"] == expected["tokens_digest"]
        for key in ("loss/ce", "loss/jepa", "loss/total", "val/loss", "val/bpb"):
            assert (key in record) == (key in expected)
            if key in expected:
                assert record[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.slow
def test_without_the_objective_and_in_the_home_folder(corpus: Path) -> None:
    changes = {"run__dir": "~/plain", "train__steps": 2, "jepa__lambda": 0}
    finished = run_module("jepa_dist.train", *settings(corpus, **changes), environ={"HOME": corpus})
    assert finished.code == 0, finished.output
    for record in records(corpus / "plain"):
        assert record["loss/jepa"] is None
        assert record["loss/total"] == record["loss/ce"]


# ---------------------------------------------------------------------------- before anything runs


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, Any]:
    """Return an environment in which importing torch fails."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return {"PYTHONPATH": tmp_path}


@pytest.mark.slow
def test_without_a_tokenizer_there_are_no_bits_per_byte(corpus: Path) -> None:
    run_dir = corpus / "no_tokenizer"
    arguments = settings(corpus, run__dir=run_dir, train__steps=2, data__tokenizer="null")
    finished = run_module("jepa_dist.train", *arguments)
    assert finished.code == 0, finished.output
    assert "nats per token\n" in finished.output
    assert records(run_dir)[-1]["val/bpb"] is None


def test_help(no_torch: dict[str, Any]) -> None:
    finished = run_command(*TRAIN, "--help", environ=no_torch)
    assert finished.code == 0
    for part in ("usage: python -m jepa_dist.train", "config", "KEY=VALUE", "--print-config"):
        assert part in finished.output


def test_print_config(corpus: Path, no_torch: dict[str, Any]) -> None:
    config = corpus / "some.yaml"
    config.write_text("seed: 5\njepa: {lambda: 0.1, layer: 1}\n")
    environ = no_torch | {"JEPA_LAMBDA": "0.2", "JEPA_LAYER": "0"}
    for arguments in (
        ["--print-config", config, "jepa.layer=2"],
        [config, "--print-config", "jepa.layer=2"],
        [config, "jepa.layer=2", "--print-config"],
    ):
        finished = run_command(*TRAIN, *arguments, environ=environ)
        assert finished.code == 0, finished.output
        shown = [" ".join(line.split()) for line in finished.output.splitlines()]
        assert f"seed: 5 # file {config}" in shown
        assert "jepa.lambda: 0.2 # environment JEPA_LAMBDA" in shown
        assert "jepa.layer: 2 # command line" in shown
        assert "model.num_layers: 4 # default" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"jepa__lamda": 1}, ["jepa.lamda: unknown key (did you mean 'jepa.lambda'?)"]),
        (
            {"seed": "x", "batch__micro": 0},
            ["seed='x': Input should be a valid integer", "batch.micro=0: Input should be greater"],
        ),
        (
            {"model__num_heads": 5, "jepa__layer": 4},
            ["model.num_heads=5: must divide", "num_kv_heads=2: must divide", "jepa.layer=4: must"],
        ),
        ({"model__vocab_size": 300}, ["has 257 ids, but model.vocab_size=300"]),
        (
            {"data__train": "nowhere/train_*.bin", "data__val": "nowhere/val_*.bin"},
            [
                "data.train='nowhere/train_*.bin': no token shard",
                "data.val='nowhere/val_*.bin': no",
            ],
        ),
        ({"model__seq_len": 500}, ["data.val="]),
    ],
)
def test_user_errors_are_printed_in_one_line_each(
    corpus: Path, no_torch: dict[str, Any], changes: dict[str, Any], expected: list[str]
) -> None:
    finished = run_command(*TRAIN, *settings(corpus, **changes), environ=no_torch)
    assert finished.code == 2, finished.output
    lines = finished.output.splitlines()
    assert len(lines) == len(expected), finished.output
    for line, part in zip(sorted(lines), sorted(expected, key=_order(lines)), strict=True):
        assert line.startswith("error: ")
        assert part in line
    assert not (corpus / "run").exists()


def _order(lines: list[str]) -> Any:
    """Sort the expected parts like the lines that contain them."""
    return lambda part: next((i for i, line in enumerate(sorted(lines)) if part in line), -1)


@pytest.mark.parametrize("arguments", [[], ["--verbose", "config.yaml"], ["none.yaml"], ["/"]])
def test_bad_command_lines(no_torch: dict[str, Any], arguments: list[str]) -> None:
    finished = run_command(*TRAIN, *arguments, environ=no_torch)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith("error: ")


def test_user_errors_are_printed_once_under_torchrun(corpus: Path) -> None:
    finished = run_command(*UNDER_TORCHRUN, *settings(corpus, batch__sequences=1, seed=1))
    assert finished.code != 0
    assert finished.output.count("error: batch.sequences=1: the global batch needs") == 1
    assert finished.seconds < SOON


# ---------------------------------------------------------------------------- the run directory


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_finished_run_is_not_touched(alone: Finished, corpus: Path, run_dir: Path) -> None:
    before = contents(run_dir)
    finished = run_module("jepa_dist.train", *settings(corpus, run__dir=run_dir, **SHORT))
    assert finished.code == 0
    assert f"{run_dir}: finished already, after step 9; nothing to do" in finished.output
    assert contents(run_dir) == before


def test_a_run_directory_stands_for_its_newest_checkpoint(
    alone: Finished, corpus: Path, run_dir: Path
) -> None:
    changes = SHORT | {"train__steps": 10, "checkpoint__resume": run_dir}
    finished = run_module(
        "jepa_dist.train", *settings(corpus, run__dir=corpus / "branch", **changes)
    )
    assert finished.code == 0, finished.output
    assert f"resuming from {run_dir}/checkpoints/step_00000009, after step 9" in finished.output


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model.safetensors", {}, "is a file; expected the folder of a checkpoint"),
        ("missing", {}, "no such folder"),
        ("", {"optim__ema_decay": 0.9}, "optim.ema_decay: was 0.0, is 0.9: the moving average"),
    ],
)
def test_paths_that_cannot_be_resumed_from(
    alone: Finished, corpus: Path, run_dir: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    other = settings(
        corpus, run__dir=corpus / "other", checkpoint__resume=run_dir / name, **SHORT, **changes
    )
    finished = run_module("jepa_dist.train", *other)
    assert finished.code == 2
    (line, *advice) = finished.output.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert len(advice) <= 1
    assert not (corpus / "other").exists()


def test_an_existing_run_is_not_overwritten(alone: Finished, corpus: Path, run_dir: Path) -> None:
    before = contents(run_dir)
    again = settings(corpus, run__dir=run_dir, checkpoint__resume="never", **SHORT)
    finished = run_module("jepa_dist.train", *again)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: run.dir={run_dir}: exists already and is not overwritten")
    assert contents(run_dir) == before


def test_unwritable_run_directory(corpus: Path) -> None:
    (corpus / "file").write_text("not a folder")
    finished = run_module("jepa_dist.train", *settings(corpus, run__dir=corpus / "file" / "run"))
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: run.dir={corpus}/file/run: cannot be written: Not a directory")


# ---------------------------------------------------------------------------- failures in mid-run


def place_of(corpus: Path, step: int, world_size: int, rank: int) -> tuple[Path, int]:
    """Return a shard and a position in it that is first read at ``step``, by ``rank`` only."""
    config = load(None, settings(corpus)[1:], {}).config
    shards = find_shards(config.data.train, "data.train")
    windows = [num_windows(read_count(path), config.model.seq_len) for path in shards]
    layout = BatchLayout(config.batch.sequences, config.batch.micro, rank, world_size)
    assert (step + 1) * layout.sequences <= sum(windows), "one epoch, so that no sample comes twice"
    sample = step * layout.sequences + layout.rows[0]
    window = int(sample_order(sample, 1, sum(windows), config.seed)[0])
    shard = 0
    while window >= windows[shard]:
        window -= windows[shard]
        shard += 1
    return shards[shard], window * config.model.seq_len + 5


@pytest.mark.slow
def test_damaged_data_met_by_one_rank(tmp_path: Path) -> None:
    """The error comes from a loader process."""
    write_corpus(tmp_path, train_tokens=200_000)
    shard, token = place_of(tmp_path, step=60, world_size=2, rank=1)
    tokens = np.memmap(shard, dtype="<u2", mode="r+", offset=1024)
    arguments = settings(tmp_path, train__steps=5000, data__workers=1)
    with Command([*UNDER_TORCHRUN, *arguments]) as job:
        # While it runs: before training, the check of the data would find it.
        job.wait_for(lambda: has_logged(tmp_path / "run"), 60)
        tokens[token] = 9999
        finished = job.wait(120)
    assert finished.code != 0
    message = f"[rank 1] error: {shard}: holds token id 9999"
    assert finished.output.count(message) == 1, finished.output
    assert "holds token id 9999" in (tmp_path / "run/logs/rank_1.log").read_text()
    last = records(tmp_path / "run")[-1]
    assert last["step"] <= 60
    assert "final" not in last


RAISES_ON_RANK_1 = """
from jepa_dist.process.dist_env import launched_rank
from jepa_dist.train import main
from jepa_dist.training.loop import Trainer

step = Trainer.step

def failing_step(self, plan):
    if launched_rank() == 1 and plan.step == 3:
        raise RuntimeError("a deliberate failure")
    step(self, plan)

Trainer.step = failing_step
if __name__ == "__main__":
    main()
"""


def test_exception_on_one_rank(corpus: Path, tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(RAISES_ON_RANK_1)
    arguments = settings(corpus, run__dir=tmp_path / "run", train__steps=1000)
    finished = run_command(*TORCHRUN, program, *arguments)
    assert finished.code != 0
    assert finished.seconds < patience(60)  # start-up included
    assert "[rank 1] failed:" in finished.output
    assert "RuntimeError: a deliberate failure" in finished.output
    assert "a deliberate failure" in (tmp_path / "run/logs/rank_1.log").read_text()
    last = records(tmp_path / "run")[-1]["step"]
    assert last <= 3
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["saved"]) == ("failed", False)
    # Rank 1 adds its failure to the status, which rank 0 writes after the record of a step.
    assert last - 1 <= status["step"] <= last


@pytest.mark.slow
def test_killed_rank(corpus: Path, tmp_path: Path) -> None:
    """Of rank 0, which writes the records; tests/test_elastic.py kills others, too."""
    arguments = settings(corpus, run__dir=tmp_path / "run", train__steps=10**6, data__workers=1)
    with Command([*UNDER_TORCHRUN, *arguments]) as job:
        job.wait_for(lambda: has_logged(tmp_path / "run"), 60)
        victim = job.rank(0)
        victim.kill()
        killed = time.monotonic()
        finished = job.wait(120)
    assert time.monotonic() - killed < SOON
    assert finished.code != 0
    assert f"Signal 9 (SIGKILL) received by PID {victim.pid}" in finished.output
    assert "final" not in records(tmp_path / "run")[-1]


@pytest.mark.slow
def test_stop_signal_while_waiting_for_data(corpus: Path, tmp_path: Path) -> None:
    """The step cannot finish, so the rank exits after the grace time, with a message."""
    run_dir = tmp_path / "run"
    changes = {"train__steps": 10**6, "data__workers": 1, "checkpoint__grace_seconds": 3}
    with Command([*TRAIN, *settings(corpus, run__dir=run_dir, **changes)]) as job:
        job.wait_for(lambda: has_logged(run_dir), 60)
        process = job.process()
        assert process is not None
        helpers = process.children(recursive=True)
        for helper in helpers:
            helper.suspend()
        job.wait_for(lambda: stands_still(run_dir), 60)
        job.signal(signal.SIGTERM)
        wait_until(lambda: job.process() is None, 60)
        for helper in helpers:
            helper.resume()
        finished = job.wait(10)
    assert finished.code == 4
    assert "not stopped 3 s after SIGTERM: " in finished.output
    assert "leaving without a checkpoint (checkpoint.grace_seconds)" in finished.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        pytest.param(TRAIN, [signal.SIGINT], id="alone"),  # others: test_process_signals.py
        pytest.param(
            ("nohup", *UNDER_TORCHRUN),
            [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT],
            id="torchrun",
        ),
    ],
)
def test_stop_signal(
    corpus: Path, tmp_path: Path, command: tuple[str, ...], numbers: list[signal.Signals]
) -> None:
    run_dir = tmp_path / "run"
    arguments = settings(corpus, run__dir=run_dir, train__steps=10**6, data__workers=1)
    with Command([*command, *arguments]) as job:
        job.wait_for(lambda: has_logged(run_dir), 60)
        assert listening(job.processes()) == {"127.0.0.1"}, "nothing beyond this machine"
        for number in numbers:  # more than one may arrive; nohup ignores the first
            job.signal(number)
            time.sleep(0.05)
        finished = job.wait(60)
    assert "stopped after step" in finished.output
    assert "Traceback" not in finished.output
    assert finished.code == 0 or command[0] == "nohup"  # torchrun reports the signal
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped"
    assert "SIGHUP" not in status["reason"]
    saved = status["step"]
    assert (run_dir / "checkpoints" / f"step_{saved:08d}" / "manifest.json").is_file()
    # The same command resumes, and the records are those of one run.
    rest = run_module("jepa_dist.train", *arguments, f"train.stop_at={saved + 3}")
    assert rest.code == 0, rest.output
    assert [record["step"] for record in records(run_dir)] == list(range(1, saved + 4))


@pytest.mark.slow
def test_a_run_that_ends_with_nonfinite_losses(corpus: Path, tmp_path: Path) -> None:
    """Not finished, exit code 3, no export, a reason in the record; the same on a second start."""
    # Each step multiplies the matrices by -1e6, until they overflow.
    growth = {"optim__matrix_lr": 1000, "optim__matrix_wd": 1000, "optim__warmdown_frac": 0}
    options = settings(
        corpus, run__dir=tmp_path / "run", train__steps=8, optim__grad_clip_norm=0, **growth
    )
    for _ in range(2):
        finished = run_module("jepa_dist.train", *options)
        assert finished.code == 3, finished.output
        assert re.search(r"error: the last \d step\(s\) of the run were skipped", finished.output)
        assert "Traceback" not in finished.output
    assert not list((tmp_path / "run").glob("*.safetensors"))
    *_, last = records(tmp_path / "run")
    assert (last["step"], last["diverged"]) == (8, True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert '"grad_norm": null' in lines
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
