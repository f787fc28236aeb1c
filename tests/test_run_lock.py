"""One owner per run directory: a second start is rejected, a dead owner's lock is taken over."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from jepa_dist.errors import UserError
from jepa_dist.monitor.run_dir import current_status
from jepa_dist.run.lock import LOCK_NAME, RunLock, is_in_use
from tests.support.commands import Command

HOLDS = """
import sys, time
from pathlib import Path
from jepa_dist.run import lock as run_lock
run_lock.RENEW_SECONDS = 0.2
lock = run_lock.RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(50)
"""


def edit(run_dir: Path, **changes: object) -> None:
    """Change fields of the lock file."""
    path = run_dir / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


@pytest.fixture
def dead(run_dir: Path) -> Path:
    """A run directory whose owner was killed."""
    with Command([sys.executable, "-c", HOLDS, run_dir]) as owner:
        owner.wait_for(lambda: "held" in owner.output(), 60)
        assert is_in_use(run_dir) is True
    return run_dir


def test_the_lock_leaves_nothing_behind(run_dir: Path) -> None:
    lock = RunLock(run_dir)
    assert lock.acquire() == ()
    assert [path.name for path in run_dir.iterdir()] == [LOCK_NAME]
    lock.release()
    assert not run_dir.exists()
    assert is_in_use(run_dir) is None


def test_a_second_start_is_refused(run_dir: Path) -> None:
    first = RunLock(run_dir)
    first.acquire()
    with pytest.raises(UserError) as caught:
        RunLock(run_dir).acquire()
    (problem,) = caught.value.problems
    assert f"is in use by process {os.getpid()} on " in problem
    assert "name another one (run.dir=...)" in problem
    assert [path.name for path in run_dir.iterdir()] == [LOCK_NAME]
    first.release()
    second = RunLock(run_dir)
    second.acquire()
    second.release()


def test_a_killed_owner_s_lock_is_taken_over_at_once(dead: Path) -> None:
    assert is_in_use(dead) is False
    lock = RunLock(dead)
    assert lock.acquire() == ()
    assert is_in_use(dead) is True
    lock.release()


def test_the_status_of_a_killed_run(dead: Path) -> None:
    """Its status.json still says running; lock and checkpoints show that it was killed."""
    (dead / "checkpoints/step_00000030").mkdir(parents=True)
    for step in (40, 30):
        (dead / "status.json").write_text(f'{{"state": "running", "step": {step}, "reason": ""}}')
        status = current_status(dead)
        assert (status["state"], status["step"], status["checkpoint"]) == ("killed", step, 30)
        assert status["saved"] is (step == 30)
    lock = RunLock(dead)
    lock.acquire()
    assert current_status(dead)["state"] == "running"
    lock.release()


def test_a_reused_pid(dead: Path) -> None:
    edit(dead, pid=os.getpid())
    RunLock(dead).acquire()


def test_an_owner_on_another_host_that_died_long_ago(dead: Path) -> None:
    edit(dead, machine="another", host="far")
    os.utime(dead / LOCK_NAME, (1, 1))
    (message,) = RunLock(dead).acquire()
    assert "was in use by process" in message
    assert "on far, which has not renewed its lock" in message


def test_an_owner_on_another_host_that_is_alive(run_dir: Path) -> None:
    with Command([sys.executable, "-c", HOLDS, run_dir]) as owner:
        owner.wait_for(lambda: "held" in owner.output(), 60)
        path = run_dir / LOCK_NAME
        token = json.loads(path.read_text())["token"]
        edit(run_dir, machine="another", host="far")
        assert json.loads(path.read_text())["token"] == token
        with pytest.raises(UserError, match=r"is in use by process .* on far"):
            RunLock(run_dir).acquire()


def test_an_owner_on_another_host_that_died_just_now(
    dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepa_dist.run.lock.STALE_SECONDS", 1.0)
    edit(dead, machine="another")
    assert RunLock(dead).acquire()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\xff" * 10000])
def test_a_damaged_lock_that_is_not_renewed_is_taken_over(
    run_dir: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepa_dist.run.lock.STALE_SECONDS", 0.6)
    run_dir.mkdir(parents=True)
    (run_dir / LOCK_NAME).write_text(text)
    (message,) = RunLock(run_dir).acquire()
    assert "an unknown process" in message


def test_a_run_that_loses_the_lock_exits(run_dir: Path) -> None:
    with Command([sys.executable, "-c", HOLDS, run_dir]) as owner:
        owner.wait_for(lambda: "held" in owner.output(), 60)
        edit(run_dir, token="another", host="elsewhere")
        finished = owner.wait(20)
    assert finished.code == 1
    assert f"error: run.dir={run_dir}: was taken over by process " in finished.output


def test_one_of_many_concurrent_starts_gets_the_lock(dead: Path) -> None:
    """In a new directory, and in that of a dead owner."""
    for folder in (dead, dead.with_name("fresh")):
        owners: list[RunLock] = []
        refused: list[UserError] = []
        barrier = threading.Barrier(8)

        def start(folder=folder, owners=owners, refused=refused, barrier=barrier) -> None:
            lock = RunLock(folder)
            barrier.wait()
            try:
                lock.acquire()
                owners.append(lock)
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(owners), len(refused)) == (1, 7)
        owners[0].release()


def test_a_folder_that_cannot_be_written_is_left_unlocked(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert RunLock(tmp_path / "run").acquire() == ()
    tmp_path.chmod(0o700)
