"""A sweep as a job array: throttled, one job per member, killed members resume."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa_dist.sweep.members import Member, read_sweep
from jepa_dist.sweep.results import read_results
from tests.slurm.checkout import PACE, PATIENCE, Checkout
from tests.slurm.cluster import Job
from tests.support.commands import run_command
from tests.support.tiny import tiny_overrides

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 50
ARMS = {
    "control": {"jepa.lambda": 0.0},
    "delayed": {"jepa.lambda": 0.1, "jepa.start_frac": 0.3},
    "full": {"jepa.lambda": 0.1},
}


@pytest.fixture
def sweep(checkout: Checkout) -> Path:
    """Three arms at one seed; each member takes a while and saves often."""
    own = ("run.dir", "jepa.lambda", "train.steps")
    tiny = dict(item.split("=", 1) for item in tiny_overrides(checkout.corpus))
    common: dict[str, Any] = {k: yaml.safe_load(v) for k, v in tiny.items() if k not in own}
    common |= {"train.steps": STEPS, "train.log_every": 5, "checkpoint.every": 5}
    common |= {"run.dir": str(checkout.folder / "runs")}
    base = checkout.corpus / "base.yaml"
    base.touch()
    file = checkout.corpus / "sweep.yaml"
    listed = {"config": str(base), "seeds": [1], "common": common, "arms": ARMS}
    file.write_text(yaml.safe_dump(listed, sort_keys=False))
    return file


def script(checkout: Checkout) -> Path:
    return checkout.folder / "slurm/jepa_sweep.sh"


def submit(checkout: Checkout, sweep: Path) -> list[Job]:
    """Submit as a user does; return one job for each member."""
    environ = [f"VENV={sys.prefix}", "MAX_RUNNING=2", f"PYTHONPATH={PACE}"]
    output = f"--output={sweep.parent}/%x-%A_%a.out"
    printed = checkout.cluster.run("env", *environ, "bash", script(checkout), output, sweep)
    found = re.search(r"Submitted batch job (\d+)", printed)
    assert found is not None, printed
    assert f"launch/sweep.py results {sweep}" in printed
    return [Job(checkout.cluster, f"{found[1]}_{index}") for index in range(len(ARMS))]


def has_saved(member: Member) -> bool:
    return (member.run_dir / "checkpoints/latest").exists()


def is_done(member: Member) -> bool:
    metrics = member.run_dir / "metrics.jsonl"
    return metrics.exists() and '"final": true' in metrics.read_text()


def test_all_members_complete_though_some_are_killed(checkout: Checkout, sweep: Path) -> None:
    """One loses its node, one is cancelled: only the latter must be submitted again."""
    cluster, members = checkout.cluster, read_sweep(sweep)
    lost, cancelled, last = submit(checkout, sweep)

    lost.wait_for(lambda: has_saved(members[0]), PATIENCE, "a checkpoint of member 0")
    assert last.state() == "PENDING", "two at a time, though nodes are free"
    node = lost.field("NodeList")
    cluster.kill_node(node)
    cancelled.wait_for(lambda: has_saved(members[1]), PATIENCE, "a checkpoint of member 1")
    cluster.run("scancel", cancelled.id)
    lost.wait_for(
        # Not on the node just revived: there SLURM may still end steps of the first start.
        lambda: lost.state() == "RUNNING" and lost.field("NodeList") != node,
        PATIENCE,
        "the second start, on another node",
    )
    cluster.start_node(node)

    for job in (lost, last):
        assert job.wait(2 * PATIENCE) == "COMPLETED", job.output()
    assert cancelled.wait(PATIENCE) == "CANCELLED"
    assert [is_done(member) for member in members] == [True, False, True]
    assert int(lost.field("Restarts")) == 1
    assert "resuming from" in lost.output()
    assert last.field("Restarts") == "0", "what happens to one member is nothing to the others"

    array = single(checkout, "--array=0,1", "slurm/jepa_sweep.sh", sweep)
    done, again = (Job(cluster, f"{array.id}_{index}") for index in (0, 1))
    for job in (done, again):
        assert job.wait(2 * PATIENCE) == "COMPLETED", job.output()
    assert f"finished already, after step {STEPS}; nothing to do" in done.output()
    assert "resuming from" in again.output()

    results = read_results(members)
    assert results.left_out == [], "all are finished, and pairs saw the same tokens"
    assert len(results.differences("delayed", "val/bpb")) == 1


def single(checkout: Checkout, *arguments: object, **environ: object) -> Job:
    """``sbatch ... slurm/jepa_sweep.sh ...``"""
    environ = {"VENV": sys.prefix, **environ}
    return checkout.cluster.sbatch(*arguments, cwd=checkout.folder, environ=environ)


def test_plain_sbatch_is_refused(checkout: Checkout, sweep: Path) -> None:
    """Plain sbatch would train nothing: it fails at once with the right command."""
    job = single(checkout, "slurm/jepa_sweep.sh", sweep)
    assert job.wait(PATIENCE) == "FAILED"
    (command,) = re.findall(r"sbatch --array.*", job.output())
    expected = ["sbatch", "--array=0-2%4", str(script(checkout)), str(sweep)]
    assert shlex.split(command) == expected


def test_a_task_beyond_the_list(checkout: Checkout, sweep: Path) -> None:
    job = single(checkout, "--array=3", "slurm/jepa_sweep.sh", sweep)
    task = Job(checkout.cluster, f"{job.id}_3")
    assert task.wait(PATIENCE) == "FAILED"
    assert "error: INDEX=3: this sweep's members are 0..2" in task.output()


def test_a_switch_in_the_environment(checkout: Checkout, sweep: Path) -> None:
    """It would affect only some arms; refused at submission and in the job."""
    expected = "error: environment JEPA_LAYER: a sweep's settings come from its file; unset it"
    job = single(checkout, "--array=0", "slurm/jepa_sweep.sh", sweep, JEPA_LAYER=1)
    task = Job(checkout.cluster, f"{job.id}_0")
    assert task.wait(PATIENCE) == "FAILED"
    assert expected in task.output()
    environ = {"VENV": sys.prefix, "JEPA_LAYER": 1}
    before = run_command("bash", script(checkout), sweep, environ=environ)
    assert (before.code, before.output) == (2, expected + "\n")


def test_dry_run(checkout: Checkout, sweep: Path) -> None:
    environ = {"VENV": sys.prefix}
    command = ["bash", script(checkout), "--dry-run", "--nodes=2", sweep]
    finished = run_command(*command, environ=environ)
    assert finished.code == 0, finished.output
    first, _, *members = finished.output.splitlines()
    submitted = ["sbatch", "--array=0-2%4", "--nodes=2", str(script(checkout)), str(sweep)]
    assert shlex.split(first) == submitted
    assert members == [
        f"{member.index}  bash slurm/jepa_8node.sh {shlex.join(member.arguments)}"
        for member in read_sweep(sweep)
    ]
