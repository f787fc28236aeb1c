"""``sbatch slurm/jepa_8node.sh`` on a real SLURM: virtual nodes, real daemons, small CPU runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.slurm.checkout import PACE, PATIENCE, Checkout, world_sizes
from tests.slurm.cluster import Cluster, Job
from tests.support.commands import TRAIN, run_command
from tests.support.patience import patience, wait_until
from tests.support.train_command import json_lines, last_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# More steps than any test reaches, at a pace that leaves the cores to other tests.
ENDLESS = 1_000_000
IDLE = {"PYTHONPATH": PACE}


# ---------------------------------------------------------------------------- runs that succeed


@pytest.mark.timeout(1800)
def test_the_debug_run_on_eight_nodes_is_the_run_of_one_process(checkout: Checkout) -> None:
    """configs/debug.yaml, but short and not compiled: 6 steps and a smaller validation set.

    The job prepares the corpus. The ranks read it themselves: eight more processes, which import
    torch, would take the cores from other tests.
    """
    share = ("batch.micro=2", "data.workers=0")  # of each of the eight ranks
    few = ("train.steps=6", "train.log_every=1", "eval.sequences=16", "eval.sample_tokens=0")
    short = (*few, *share, "parallel.compile=false")
    settings = ["configs/debug.yaml", *short]
    job = checkout.submit(*settings)
    assert job.wait(2 * PATIENCE) == "COMPLETED", job.output()
    assert job.field("NumNodes") == "8"
    run_dir, alone = checkout.run_dir(job, "debug"), checkout.folder / "alone"
    assert world_sizes(run_dir) == [8]
    finished = run_command(
        *TRAIN, *settings, f"run.dir={alone}", cwd=checkout.folder, timeout=PATIENCE
    )
    assert finished.code == 0, finished.output
    ours, expected = json_lines(run_dir / "metrics.jsonl"), json_lines(alone / "metrics.jsonl")
    assert [record["step"] for record in ours] == [*range(1, 7), 6]
    assert ours[-1]["tokens_digest"] == expected[-1]["tokens_digest"]
    for key in ("loss/total", "loss/jepa"):
        np.testing.assert_allclose(
            [record[key] for record in ours], [record[key] for record in expected], rtol=1e-5
        )
    output = job.output()
    for message in (
        f"run       {run_dir}\n",
        "nodes     8 (continues on 4 or more): n1 n2 n3 n4 n5 n6 n7 n8\n",
        f"finished after step 6: {run_dir}\n",
    ):
        assert message in output


def test_options_overrides_and_environment_are_taken(checkout: Checkout, tmp_path: Path) -> None:
    """Submitted from another folder, with an absolute path and a site file."""
    (checkout.folder / "slurm/site.env").write_text(
        "CONTAINER=(env MARK=from-the-site-file)\nMIN_NODES=${MIN_NODES:-2}\nUNSET=$NO_SUCH_THING\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = checkout.settings(train__steps=5, batch__sequences=4, jepa__lambda=0.3)
    settings = [setting for setting in settings if not setting.startswith("jepa.lambda")]
    job = checkout.submit(
        *settings,
        options=("--nodes=2", "--job-name=mine"),
        cwd=elsewhere,
        JEPA_LAMBDA=0.25,
        NPROC_PER_NODE=2,
    )
    assert job.wait(PATIENCE) == "COMPLETED", job.output()
    assert Path(job.field("StdOut")) == elsewhere / f"mine-{job.id}.out"
    run_dir = checkout.run_dir(job)
    assert world_sizes(run_dir) == [4]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["jepa"]["lambda"] == 0.25
    assert config["batch"]["sequences"] == 4
    assert "nodes     2 (continues on 2 or more): n1 n2\n" in job.output()
    assert "ranks     2 on each node" in job.output()


def test_the_site_file_is_read_before_submission(checkout: Checkout) -> None:
    (checkout.folder / "slurm/site.env").write_text(
        "SBATCH_PARTITION=${SBATCH_PARTITION:-high}\nSBATCH_TIMELIMIT=30\n"
    )
    settings = checkout.settings(train__steps=3)
    environ = checkout.cluster.environment({"VENV": sys.prefix})
    submitted = subprocess.run(
        ["bash", str(checkout.script), "--nodes=1", *settings],
        capture_output=True,
        text=True,
        env=environ,
        cwd=checkout.folder,
        timeout=patience(60),
    )
    assert submitted.returncode == 0, submitted.stderr
    job = Job(checkout.cluster, submitted.stdout.split()[-1])
    assert job.field("Partition") == "high"
    assert job.field("TimeLimit") == "00:30:00"
    assert job.wait(PATIENCE) == "COMPLETED", job.output()
    assert job.field("NumNodes") == "1"
    assert last_step(checkout.run_dir(job)) == 3


# ---------------------------------------------------------------------------- interruptions


def stops_and_starts(job: Job) -> tuple[list[int], list[int]]:
    """Return after which steps the run was stopped, and after which it resumed."""
    output = job.output()
    stopped = re.findall(r"^stopped after step (\d+) with a checkpoint", output, re.MULTILINE)
    resumed = re.findall(r"^resuming from .*, after step (\d+)$", output, re.MULTILINE)
    return [int(step) for step in stopped], [int(step) for step in resumed]


def test_time_limit(checkout: Checkout) -> None:
    """Warned, saved, requeued, resumed, completed; no step is lost or done twice.

    On one node; the preempted job below stops on two.
    """
    job = checkout.submit(
        *checkout.settings(train__steps=ENDLESS, train__max_wallclock_seconds=110),
        # SLURM warns up to a minute too early: after one to two minutes.
        options=("--nodes=1", "--time=3", "--signal=B:USR1@60"),
        **IDLE,
    )
    assert job.wait(2 * PATIENCE) == "COMPLETED", job.output()
    restarts = int(job.field("Restarts"))
    assert restarts >= 1
    assert job.output().count("approaching the time limit: the ranks save and stop") == restarts
    stopped, resumed = stops_and_starts(job)
    assert len(stopped) == restarts
    assert stopped == resumed
    run_dir = checkout.run_dir(job)
    steps = [record["step"] for record in json_lines(run_dir / "metrics.jsonl")]
    assert steps == [*range(1, steps[-1] + 1), steps[-1]]
    assert world_sizes(run_dir) == [1] * (restarts + 1)


def test_preemption(checkout: Checkout) -> None:
    job = checkout.submit(
        *checkout.settings(train__steps=ENDLESS, train__max_wallclock_seconds=25),
        options=("--nodes=2", "--exclude=n[3-8]"),
        **IDLE,
    )
    run_dir = checkout.run_dir(job)
    job.wait_for(lambda: last_step(run_dir) >= 5, PATIENCE, "step 5")
    urgent = checkout.cluster.sbatch(
        *("--partition=high", "--nodes=2", "--exclude=n[3-8]", "--exclusive", "--wrap=sleep 2"),
        cwd=checkout.folder,
    )
    assert urgent.wait(PATIENCE) == "COMPLETED"
    assert job.wait(PATIENCE) == "COMPLETED", job.output()
    assert job.field("Restarts") == "1"
    stopped, resumed = stops_and_starts(job)
    assert stopped == resumed
    assert len(stopped) == 1
    assert f"preempted: stopped after step {stopped[0]}; requeued" in job.output()
    steps = [record["step"] for record in json_lines(run_dir / "metrics.jsonl")]
    assert steps == [*range(1, steps[-1] + 1), steps[-1]]


# ---------------------------------------------------------------------------- node failures


def stop(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR1", job.id)
    assert job.wait(PATIENCE) == "COMPLETED", job.output()


def nodes_of(job: Job) -> list[str]:
    return job.cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()


def goes_on(job: Job, run_dir: Path, ranks: list[int]) -> None:
    """Wait until the run has been started with these numbers of ranks, and trains."""
    job.wait_for(lambda: world_sizes(run_dir) == ranks, PATIENCE, f"starts with {ranks} ranks")
    begun = json_lines(run_dir / "starts.jsonl")[-1]["step"]
    job.wait_for(lambda: last_step(run_dir) >= begun + 5, PATIENCE, "new steps")


def test_a_dead_node(checkout: Checkout, cluster: Cluster) -> None:
    job = checkout.submit(
        *checkout.settings(train__steps=ENDLESS, checkpoint__every=5),
        options=("--nodes=3", "--exclude=n[4-8]"),
        **IDLE,
    )
    run_dir = checkout.run_dir(job)
    saved = run_dir / "checkpoints/latest"
    job.wait_for(saved.exists, PATIENCE, "a checkpoint")
    cluster.kill_node("n3")
    goes_on(job, run_dir, [3, 2])
    assert job.state() == "RUNNING"
    assert json_lines(run_dir / "starts.jsonl")[-1]["step"] >= 5, "from a checkpoint"
    stop(job)


def test_a_drained_node_a_requeue_by_hand_and_a_stop_by_hand(
    checkout: Checkout, cluster: Cluster
) -> None:
    """The job continues on a draining node until it is requeued, and then gets another one."""
    job = checkout.submit(
        *checkout.settings(train__steps=ENDLESS, checkpoint__every=0),
        options=("--nodes=2", "--exclude=n[4-8]"),
        **IDLE,
    )
    run_dir = checkout.run_dir(job)
    goes_on(job, run_dir, [2])
    drained = nodes_of(job)[-1]
    cluster.run("scontrol", "update", f"node={drained}", "state=drain", "reason=test")
    step = last_step(run_dir)
    job.wait_for(lambda: last_step(run_dir) >= step + 5, PATIENCE, "steps on a draining node")
    cluster.run("scontrol", "requeue", job.id)
    goes_on(job, run_dir, [2, 2])
    assert drained not in nodes_of(job)
    stop(job)
    _, resumed = stops_and_starts(job)
    assert resumed == [json_lines(run_dir / "starts.jsonl")[1]["step"]]
    assert resumed[0] >= step + 5
    steps = [record["step"] for record in json_lines(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    assert f"stopped after step {steps[-1]} (" in job.output()
    command = f"sbatch --nodes=2 slurm/jepa_8node.sh {checkout.corpus}/tiny.yaml"
    assert f"{command} run.dir=runs/tiny-" in job.output()


# ---------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("changed", "environ", "message"),
    [
        ("jepa.lamda=1", {}, "error: command line: jepa.lamda: unknown key"),
        ("run.dir=/dev/null/x", {}, "error: run.dir=/dev/null/x: cannot be written"),
        ("data.train=nowhere/*.bin", {}, "nowhere/*.bin"),
        ("seed=2", {"MIN_NODES": 3}, "error: MIN_NODES=3: more than the 2 nodes of this job"),
        ("seed=2", {"NPROC_PER_NODE": 99}, "error: batch.sequences=6"),
        ("seed=2", {"JEPA_LAMDA": 1}, "error: environment JEPA_LAMDA: unknown switch"),
    ],
)
def test_user_errors_fail_in_seconds(
    checkout: Checkout, changed: str, environ: dict[str, object], message: str
) -> None:
    job = checkout.submit(*checkout.settings(), changed, options=("--nodes=2",), **environ)
    _fails(job, checkout, message)


def test_a_missing_configuration(checkout: Checkout) -> None:
    job = checkout.submit("configs/nowhere.yaml", options=("--nodes=2",))
    _fails(job, checkout, "error: configs/nowhere.yaml: cannot read the configuration")


def test_an_option_at_the_wrong_place(checkout: Checkout) -> None:
    job = checkout.submit("--nodes=4", *checkout.settings(), options=("--nodes=2",))
    _fails(job, checkout, "error: --nodes=4: options of sbatch must come before")


def _fails(job: Job, checkout: Checkout, message: str) -> None:
    """Assert that the job fails within seconds, with one message, before any rank starts."""
    assert job.wait(120) == "FAILED", job.output()
    output = job.output()
    assert output.count("error: ") == 1 + output.count("srun: error: "), output
    assert message in output
    assert "start 1" not in output, "no rank is started"
    assert not (checkout.folder / "runs").exists()


def test_an_impossible_time_limit_ends_the_job(checkout: Checkout) -> None:
    """A job that is warned before its first step would be requeued forever."""
    slow_start = '[[ $* == *--check ]] || sleep 120; exec "$@"'
    (checkout.folder / "slurm/site.env").write_text(f"CONTAINER=(bash -c '{slow_start}' in)\n")
    job = checkout.submit(
        *checkout.settings(train__steps=ENDLESS),
        options=("--nodes=2", "--time=1", "--signal=B:USR1@60"),
    )
    assert job.wait(PATIENCE) == "FAILED", job.output()
    assert "the time limit (--time) left no time" in job.output()
    assert job.field("Restarts") == "0"


def test_a_copy_of_the_script_names_what_is_missing(checkout: Checkout, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sh"
    copy.write_text(checkout.script.read_text())
    job = checkout.cluster.sbatch("--nodes=2", copy, cwd=tmp_path)
    assert job.wait(120) == "FAILED", job.output()
    assert "error: no checkout found around slurm/jepa_8node.sh" in job.output()


# ---------------------------------------------------------------------------- GPUs (of SLURM)


def test_one_rank_per_gpu_that_slurm_grants(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``--exclusive`` brings the GPUs along; steps must ask for them again."""
    with Cluster(tmp_path_factory.mktemp("gpus") / "cluster", nodes=1, gpus=2) as cluster:
        checkout = Checkout(tmp_path, cluster)
        (checkout.folder / "slurm/site.env").write_text(
            'SRUN_ARGS=(--export="ALL,CUDA_VISIBLE_DEVICES=")\n'
            "CONTAINER=(bash -c 'echo gpus of the step: $SLURM_GPUS_ON_NODE; exec \"$@\"' in)\n"
        )
        job = checkout.submit(*checkout.settings(train__steps=2), options=("--nodes=1",))
        assert job.wait(PATIENCE) == "COMPLETED", job.output()
        assert world_sizes(checkout.run_dir(job)) == [2]
        assert job.output().count("gpus of the step: 2\n") == 2, "preflight and agent"
        none = checkout.submit(options=("--nodes=1", "--exclusive=user"))
        assert none.wait(120) == "FAILED", none.output()
        assert "error: the nodes have GPUs and this job got none" in none.output()


def test_nothing_is_left_running(cluster: Cluster) -> None:
    """After all tests above: no process of any job."""
    wait_until(lambda: not cluster.processes(), 30, cluster.processes, every=0.5)
