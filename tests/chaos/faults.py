"""What happens to a run: one function per scenario, the table of all at the end.

A function starts the run and hurts it; the harness sees to the rest. What it claims besides (what
must be told, what must be left) it asserts itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.chaos.harness import (
    EVALUATE_EVERY,
    LONG,
    RANKS,
    SAVE_EVERY,
    STEPS,
    Run,
    SkippedError,
    free_port,
)
from tests.chaos.moments import SAVING, Moment, last_record, newest

Fault = Callable[[Run], None]

# Of random moments: leaves something to do after it.
_LAST = STEPS - 10
_CLOCK = Path(__file__).parent / "clock"
_THREAD = Path(__file__).parent / "thread"

# ---------------------------------------------------------------------------- moments to strike


def while_it_starts(run: Run, strike: Fault) -> None:
    """Importing, meeting, loading: up to some seconds after the processes are there."""
    run.wait_for_ranks()
    time.sleep(run.random.uniform(0, 8))
    strike(run)


def in_a_step(run: Run, strike: Fault) -> None:
    """Anywhere between two records."""
    run.wait_for_step(run.step + 1, max(run.step + 1, _LAST))
    time.sleep(run.random.uniform(0, 0.2))
    strike(run)


def in_evaluation(run: Run, strike: Fault) -> None:
    """A rank says that it evaluates."""
    run.wait_for_step(EVALUATE_EVERY - 3)
    run.wait_for_phase(run.pick_rank(), "evaluation")
    strike(run)


def in_a_data_wait(run: Run, strike: Fault) -> None:
    """The loader of a rank stands still until the rank waits for it."""
    run.wait_for_step(2, _LAST)
    rank = run.pick_rank()
    loaders = run.ranks()[rank].children(recursive=True)
    for loader in loaders:
        loader.suspend()
    run.wait_for_phase(rank, "data_wait")
    strike(run)
    for loader in loaders:  # or it could not notice that its rank is gone
        with suppress(psutil.NoSuchProcess):
            loader.resume()


def at(moment: Moment) -> Callable[[Run, Fault], None]:
    """At a moment of a save, the first one after a random step."""

    def wait(run: Run, strike: Fault) -> None:
        run.wait_for_step(0, _LAST)
        with run.frozen_at(moment):
            strike(run)

    return wait


MOMENTS = {
    "while it starts": while_it_starts,
    "in a step": in_a_step,
    "in evaluation": in_evaluation,
    "in a data wait": in_a_data_wait,
    **{name: at(moment) for name, moment in SAVING.items()},
}

# ---------------------------------------------------------------------------- processes


def kill_rank(moment: str) -> Fault:
    """kill -9 of a random rank; torchrun starts all again."""

    def fault(run: Run) -> None:
        run.start()
        MOMENTS[moment](run, Run.kill_rank)

    return fault


def kill_rank_at_the_end(run: Run) -> None:
    """The last checkpoint is published, and nothing is left to do but what follows it."""
    run.start()
    run.wait_for_step(STEPS - 1)

    def is_near(run_dir: Path) -> bool:
        return int(last_record(run_dir)["step"]) >= STEPS - 1

    with run.frozen_at(lambda run_dir: newest(run_dir) == f"step_{STEPS:08d}", is_near):
        run.kill_rank(0)


def kill_agent(run: Run) -> None:
    """kill -9 of torchrun, at a random moment; the same command goes on."""
    run.start()
    moment = run.random.choice(sorted(MOMENTS))
    run.details.append(moment)
    MOMENTS[moment](run, Run.kill_agent)


def kill_three_times(run: Run) -> None:
    """Ranks killed in one start after the other, the second before it has got anywhere."""
    run.start()
    in_a_step(run, Run.kill_rank)
    victims = {process.pid for process in run.ranks().values()}
    run.wait_for(lambda: not victims & {process.pid for process in run.ranks().values()})
    while_it_starts(run, Run.kill_rank)
    run.wait_for(lambda: all(strike.recovered for strike in run.strikes))
    in_a_step(run, Run.kill_rank)


def kill_while_it_compiles(run: Run) -> None:
    """With regions compiled, and nothing in the compiler's cache."""
    run.changes["parallel__compile"] = True
    run.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run.dir.parent / "compiler_cache")
    run.start()
    cache = run.dir.parent / "compiler_cache"
    run.wait_for(lambda: any(cache.glob("*/*")), 2 * LONG)
    time.sleep(run.random.uniform(0, 5))
    run.kill_rank()


def stop_rank_for_good(run: Run) -> None:
    """SIGSTOP: cut by the time limit of collectives, and named by the watchdog before."""
    run.changes["parallel__timeout_seconds"] = 10 * run.session.patience
    run.start()
    run.wait_for_step(1, _LAST)
    rank = run.pick_rank()
    victim = run.ranks()[rank]
    run.send(signal.SIGSTOP, victim, f"rank {rank}")
    told = f"pid {victim.pid}) sends no heartbeat"
    run.wait_for(lambda: told in run.output())


def stall_rank(run: Run) -> None:
    """SIGSTOP and, some seconds later, SIGCONT: nothing has to start again."""
    run.start()
    run.wait_for_step(1, _LAST)
    rank = run.pick_rank()
    victim = run.ranks()[rank]
    run.strike(f"SIGSTOP to rank {rank}", restarts=False)
    victim.suspend()
    time.sleep(run.random.uniform(1, 5))
    victim.resume()
    run.wait_for_end()
    assert len(run.starts) == 1, "a short stall cost a restart"


def ask_to_stop(run: Run) -> None:
    """A stop signal to a rank or to torchrun: a checkpoint, then the same command goes on."""
    run.start()
    moment = run.random.choice(["in a step", "in evaluation", *SAVING])
    number = run.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    run.details.append(moment)

    def strike(run: Run) -> None:
        if run.random.random() < 0.5:
            rank = run.pick_rank()
            run.send(number, run.ranks()[rank], f"rank {rank}")
        else:
            run.send(number, run.agents()[0], "torchrun")

    MOMENTS[moment](run, strike)
    run.wait_for_end()
    status = run.status
    assert (status["state"], status["saved"]) == ("stopped", True), status
    run.start()
    run.wait_for(lambda: len(run.starts) == 2)
    assert run.starts[-1]["step"] == status["step"], "work was lost although it was saved"


# ---------------------------------------------------------------------------- disks


def full_disk(run: Run) -> None:
    """No room for checkpoints: the save fails and says so; with room the same command goes on."""
    with _own_disk(run):
        run.start(max_restarts=0)
        run.wait_for(lambda: run.step >= run.starts[-1]["step"] + 1)
        run.strike("disk full")
        filler = run.checkpoints / "filler"
        _fill(filler)
        _see_it_fail(run, "No space left on device")
        filler.unlink()
        run.start()
        run.wait_for_end()


def read_only(run: Run) -> None:
    """The folder of checkpoints cannot be written any more, and later it can."""
    with _own_disk(run):
        run.start(max_restarts=0)
        run.wait_for(lambda: run.step >= run.starts[-1]["step"] + 1)
        run.strike("disk read-only")
        _mount("-o", "remount,ro", run.checkpoints)
        _see_it_fail(run, "Read-only file system")
        _mount("-o", "remount,rw", run.checkpoints)
        run.start()
        run.wait_for_end()


def _see_it_fail(run: Run, why: str) -> None:
    ended = run.wait_for_end()
    assert ended.code != 0, "the save failed, but the run says that all is well"
    assert why in ended.output, f"not told: {why}"
    assert run.status["state"] == "failed", run.status
    assert why in run.status["reason"], run.status


@contextmanager
def _own_disk(run: Run) -> Iterator[None]:
    """Checkpoints on a small file system of their own, some steps into the run."""
    run.take_over_stopped()
    kept = run.checkpoints.rename(run.checkpoints.with_name("kept"))
    run.checkpoints.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", run.checkpoints)
    except (OSError, subprocess.CalledProcessError):
        raise SkippedError("needs the right to mount a small file system") from None
    try:
        shutil.copytree(kept, run.checkpoints, dirs_exist_ok=True)
        shutil.rmtree(kept)
        yield
    finally:
        subprocess.run(["umount", "--lazy", run.checkpoints], check=True)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass


# ---------------------------------------------------------------------------- files


def damage(what: str, hurt: Callable[[Run, Path], str], *, told: str = "") -> Fault:
    """Something happens to the newest checkpoint between two starts.

    Args:
        what: In words.
        hurt: Does it, and says to which file.
        told: What the next start must say.
    """

    def fault(run: Run) -> None:
        run.take_over_stopped()
        newest = max(run.checkpoints.glob("step_*"))
        run.strike(f"{what}: {hurt(run, newest)}")
        run.start()
        run.wait_for_end()
        assert told in run.output(), f"not told: {told}"

    return fault


def truncate(run: Run, checkpoint: Path) -> str:
    """A file ends too early."""
    path = _any_file(run, checkpoint)
    os.truncate(path, run.random.randrange(path.stat().st_size))
    return path.name


def lose(run: Run, checkpoint: Path) -> str:
    """A file is gone."""
    path = _any_file(run, checkpoint)
    path.unlink()
    return path.name


def flip_bit(run: Run, checkpoint: Path) -> str:
    """One bit of a file is another."""
    path = _any_file(run, checkpoint)
    data = bytearray(path.read_bytes())
    data[run.random.randrange(len(data))] ^= 1 << run.random.randrange(8)
    path.write_bytes(data)
    return path.name


def drop_in(run: Run, checkpoint: Path) -> str:
    """Files and folders that are nobody's, some with names like a checkpoint's."""
    (run.checkpoints / "notes.txt").write_text("mine")
    (run.checkpoints / "step_00000099").write_text("a file")
    (checkpoint / "extra.bin").write_bytes(b"not listed")
    (run.checkpoints / f"{checkpoint.name}.bak").mkdir()
    stranger = run.checkpoints / f"step_{10**8 + 7}"
    stranger.mkdir()
    (stranger / "manifest.json").write_text(json.dumps({"format": 1}))
    return stranger.name


def lead_astray(run: Run, checkpoint: Path) -> str:
    """``latest`` names nothing."""
    (run.checkpoints / "latest").write_text("step_99999999\n")
    return "latest"


def _any_file(run: Run, checkpoint: Path) -> Path:
    return run.random.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))


# ---------------------------------------------------------------------------- clock and ranks


def jump_in_time(run: Run) -> None:
    """The host's clock is set by a day, forward or back, and a rank is killed after that."""
    jump = run.dir.parent / "clock_jump"
    run.environ |= {"PYTHONPATH": _first_on_path(_CLOCK), "CHAOS_CLOCK_JUMP": str(jump)}
    run.start()
    run.wait_for_step(1, _LAST // 2)
    day = run.random.choice([-86400, 86400])
    jump.write_text(str(day))
    run.details.append(f"clock set by {day} s at step {run.step}")
    in_a_step(run, Run.kill_rank)


def fail_in_a_thread(run: Run) -> None:
    """A Python error in a thread of a random rank ends the run, at once and with that error."""
    named = run.dir.parent / "failing_rank"
    run.environ |= {"PYTHONPATH": _first_on_path(_THREAD), "CHAOS_THREAD_FAILS": str(named)}
    run.start(max_restarts=0)
    run.wait_for_step(1, _LAST)
    rank = run.pick_rank()
    run.strike(f"an error in the watchdog of rank {rank}")
    named.write_text(str(rank))
    _see_it_fail(run, "a deliberate failure")
    assert f"[rank {rank}] failed:" in run.output()
    named.unlink()
    run.start()
    run.wait_for_end()


def _first_on_path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def move_run(run: Run) -> None:
    """The run directory is renamed: the run fails and names it; renamed back, the run resumes."""
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike("run directory renamed"))
    elsewhere = run.dir.rename(run.dir.with_name("elsewhere"))
    ended = run.wait_for_end()
    assert ended.code != 0, "the checkpoints cannot be written, but the run says that all is well"
    assert f"{run.checkpoints}" in ended.output
    assert "No such file or directory" in ended.output
    shutil.rmtree(run.dir, ignore_errors=True)  # its last status
    elsewhere.rename(run.dir)
    run.start()
    run.wait_for_end()


def change_ranks(run: Run) -> None:
    """2, 1 and 3 ranks along one run, stopped or killed in between."""
    for ranks, last in ((RANKS, STEPS // 3), (1, 2 * STEPS // 3)):
        run.start(ranks)
        run.wait_for_step(max(run.step, SAVE_EVERY) + 1, max(run.step, last) + 1)
        number = run.random.choice([signal.SIGUSR1, signal.SIGKILL])
        run.send(number, run.agents()[0], f"torchrun of {ranks}")
        run.wait_for_end()
    run.start(3)
    run.wait_for_end()
    worlds = [start["world_size"] for start in run.starts]
    assert worlds == [RANKS, 1, 3], worlds


def lose_agent(run: Run) -> None:
    """One of two agents is killed: the other goes on alone."""
    port = free_port()
    run.start_agent(0, port)
    run.start_agent(1, port)
    in_a_step(run, lambda run: run.kill_agent(1))
    run.wait_for_end(3 * LONG)
    worlds = [start["world_size"] for start in run.starts]
    assert worlds == [2, 1], f"ranks along the run: {worlds}"


def add_agent(run: Run) -> None:
    """A second agent comes: both go on together."""
    port = free_port()
    run.start_agent(0, port)
    run.wait_for_step(1, 3)
    run.strike("a second agent is added")
    run.start_agent(1, port)
    run.slow_down_until(lambda: len(run.ranks()) == 2)
    run.wait_for_end(3 * LONG)
    worlds = [start["world_size"] for start in run.starts]
    assert worlds == [1, 2], f"ranks along the run: {worlds}"


FAULTS: dict[str, Fault] = {
    **{f"kill a rank {moment}": kill_rank(moment) for moment in MOMENTS},
    "kill a rank at the end": kill_rank_at_the_end,
    "kill a rank while it compiles": kill_while_it_compiles,
    "kill ranks three times": kill_three_times,
    "kill the agent": kill_agent,
    "stop a rank for good": stop_rank_for_good,
    "stall a rank": stall_rank,
    "ask to stop": ask_to_stop,
    "full disk": full_disk,
    "read-only checkpoints": read_only,
    "truncated checkpoint": damage("truncated", truncate, told="skipped, damaged or incomplete"),
    "incomplete checkpoint": damage("lost", lose, told="skipped, damaged or incomplete"),
    "flipped bit": damage("bit flipped", flip_bit, told="skipped, damaged or incomplete"),
    "foreign files": damage("dropped in", drop_in),
    "latest names nothing": damage("overwritten", lead_astray),
    "clock jump": jump_in_time,
    "an error in a thread": fail_in_a_thread,
    "run directory renamed": move_run,
    "other numbers of ranks": change_ranks,
    "lose one of two agents": lose_agent,
    "add an agent": add_agent,
}
