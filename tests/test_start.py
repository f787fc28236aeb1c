"""An invalid start exits immediately on every rank; output that cannot be written ends nothing."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_dist.data.shards import write_shard
from jepa_dist.errors import UserError
from jepa_dist.model.gpt import GPT
from jepa_dist.process.output import LossyStream
from jepa_dist.run.consistency import differences, statement
from jepa_dist.run.lock import RunLock
from jepa_dist.start.capacity import num_parameters
from jepa_dist.start.host import check_host
from tests.support.commands import TRAIN, Command, run_command
from tests.support.forked import run_module
from tests.support.tiny import tiny_config, tiny_overrides, write_corpus


def command(folder: Path, **changes: Any) -> list[str]:
    (folder / "config.yaml").touch()
    return [*TRAIN, str(folder / "config.yaml"), *tiny_overrides(folder, **changes)]


def rank_environment(world_size: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": rank, "LOCAL_RANK": 0} for rank in range(world_size)]


# ---------------------------------------------------------------------------- ranks that differ


def test_differences_are_named_with_values_and_ranks() -> None:
    stated = [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "1"}]
    found = differences(stated)
    assert found == [
        "a: 1 on ranks 0-1, 3, 2 on rank 2",
        "b: x on ranks 0, 2, y on rank 1, absent on rank 3",
    ]


def test_the_statement_covers_settings_code_and_libraries(tmp_path: Path) -> None:
    stated = statement(tiny_config(tmp_path), {})
    assert stated["model.model_dim"] == "32"
    assert stated["version of torch"] == torch.__version__
    assert {"seed", "run.dir", "code of jepa_dist", "version of python"} <= stated.keys()


@pytest.mark.slow
def test_nodes_with_other_shards_and_settings(tmp_path: Path) -> None:
    """Shards of equal size: only their content differs. Other sizes of batch and model, too."""
    nodes = [tmp_path / "one", tmp_path / "two"]
    for node in nodes:
        write_corpus(node)
    write_shard(nodes[1] / "train_1.bin", np.full(777, 5, np.uint16))
    jobs = []
    for node, environ in zip(nodes, rank_environment(2), strict=True):
        own = {"model__model_dim": 32 if node == nodes[0] else 48, "data__train": "train_*.bin"}
        words = command(node, **own, data__val="val_*.bin", run__dir=tmp_path / "run")
        jobs.append(Command(words, cwd=node, environ=environ | {"PYTHONPATH": Path.cwd()}))
    with jobs[0], jobs[1]:
        finished = [job.wait(200) for job in jobs]
    assert [each.code for each in finished] == [2, 2], finished
    (line,) = finished[0].output.splitlines()
    assert line.startswith("error: the ranks differ in what they were started with: ")
    assert "model.model_dim: 32 on rank 0, 48 on rank 1" in line
    assert "data.train: train_1.bin: 2578 bytes with digest " in line
    assert finished[1].output == ""
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    try:
        finished = run_module(*command(tmp_path)[2:], timeout=200)
    finally:
        lock.release()
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: run.dir={tmp_path}/run: is in use by process ")


# ---------------------------------------------------------------------------- this host


def test_a_host_that_cannot_run_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_host(tiny_config(tmp_path, data__workers=1))
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UserError, match="characters are too long for the sockets"):
        check_host(tiny_config(tmp_path, data__workers=1))
    check_host(tiny_config(tmp_path, data__workers=0))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="temporary files cannot be written to"):
        check_host(tiny_config(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    greedy = {"data__workers": 256, "data__prefetch": 4096, "batch__micro": 2**20}
    with pytest.raises(UserError, match=r"/dev/shm: .* MiB are free, and data\.workers=256"):
        check_host(tiny_config(tmp_path, batch__sequences=2**20, **greedy))


@pytest.mark.parametrize(
    "changes", [{}, {"model__untie_loop_mlps": True}, {"model__embedding_dim": 16}]
)
def test_the_parameters_of_the_estimate(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, **changes)
    with torch.device("meta"):
        model = GPT(config.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0.95 * total < num_parameters(config) <= total, "all but the vectors"


@pytest.mark.slow
def test_a_model_larger_than_the_host(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    sizes = {"model__model_dim": 2**17, "model__num_layers": 64, "model__num_heads": 1024}
    words = command(tmp_path, **sizes, model__num_kv_heads=1024, model__rope_dims=0)
    finished = run_module(*words[2:], timeout=200)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith("error: memory: each rank needs at least ")


# ---------------------------------------------------------------------------- output


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """Standard output on a full disk, standard error closed, input closed: the run finishes, says
    so in its log, and its status is true."""
    folder = tmp_path / "b\u00fccher"
    write_corpus(folder)
    words = command(folder, train__steps=3)
    shell = ["bash", "-c", '"$@" > /dev/full 2>&- <&-', "_", *words]
    finished = run_command(*shell, timeout=250, environ={"PYTHONIOENCODING": "ascii"})
    assert finished.code == 0
    assert (folder / "run/logs/rank_0.log").read_text().count("lines are lost") == 1
    status = json.loads((folder / "run/status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", 3, 3)
    assert status["saved"] is True
    assert status["reason"] == "all steps are done"
    assert status["tokens_per_second"] > 0


def test_control_codes_of_names_and_texts_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w+", encoding="utf-8") as file:
        stream = LossyStream("stdout", file)
        stream.write("\ra\tname \x1b[2J\x07 \x9b2J \x7f\u00fc\n")
    assert (tmp_path / "terminal").read_bytes() == (
        "\ra\tname \\x1b[2J\\x07 \\x9b2J \\x7f\u00fc\n".encode()
    )


PRINTS = """
import os, sys
from jepa_dist.process.output import keep_output_alive
keep_output_alive()
for line in range(1000):
    print("\\u00fc", line)
    print("error", file=sys.stderr)
sys.exit(0 if os.open("/dev/null", os.O_RDONLY) > 2 else 9)
"""


@pytest.mark.parametrize(
    "redirected", ["| head -n 1", "> /dev/full 2>&1", ">&- 2>&-", ">&- 2>&- <&-", ""]
)
def test_prints_never_fail(redirected: str) -> None:
    shell = f'set -o pipefail; "$0" -c "$1" {redirected}'
    environ = {"PYTHONIOENCODING": "ascii"}
    finished = run_command("bash", "-c", shell, sys.executable, PRINTS, environ=environ)
    assert finished.code == 0, finished.output
    assert "Traceback" not in finished.output
    if not redirected:
        assert "\\xfc 999" in finished.output
