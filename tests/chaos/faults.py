"""The injected faults: one function per scenario, and the table of all at the end.

A function starts the run and injects the fault; the harness waits for its end and compares it.
Messages and files that the scenario requires are asserted by the function itself.
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
    MissedError,
    Run,
    SkippedError,
    free_port,
)
from tests.chaos.moments import SAVING, Moment, last_record, newest
from tests.support.commands import compiles_a_kernel

Fault = Callable[[Run], None]

# Of random moments: leaves something to do after it.
_LAST = STEPS - 10
_CLOCK = Path(__file__).parent / "clock"
_THREAD = Path(__file__).parent / "thread"

# ---------------------------------------------------------------------------- moments


def while_it_starts(run: Run, strike: Fault) -> None:
    """Imports, rendezvous, loading: up to 8 s after the processes exist."""
    run.wait_for_ranks()
    time.sleep(run.random.uniform(0, 8))
    strike(run)


def in_a_step(run: Run, strike: Fault) -> None:
    """At a random time between two records."""
    run.wait_for_step(run.step + 1, max(run.step + 1, _LAST))
    time.sleep(run.random.uniform(0, 0.2))
    strike(run)


def in_evaluation(run: Run, strike: Fault) -> None:
    """A rank's heartbeat is in the evaluation."""
    run.wait_for_step(EVALUATE_EVERY - 3)
    run.wait_for_phase(run.pick_rank(), "evaluation")
    strike(run)


def in_the_optimizer(run: Run, strike: Fault) -> None:
    """A rank's heartbeat is in the optimizer, where memory peaks."""
    run.wait_for_step(2, _LAST)
    run.wait_for_phase(run.pick_rank(), "optimizer")
    strike(run)


def in_a_data_wait(run: Run, strike: Fault) -> None:
    """A rank waits for its loader, which is suspended."""
    run.wait_for_step(2, _LAST)
    rank = run.pick_rank()
    loaders = run.ranks()[rank].children(recursive=True)
    for loader in loaders:
        loader.suspend()
    run.wait_for_phase(rank, "data_wait")
    strike(run)
    for loader in loaders:  # so that it notices that its rank has exited
        with suppress(psutil.NoSuchProcess):
            loader.resume()


def at(moment: Moment) -> Callable[[Run, Fault], None]:
    """Return a wait for this moment in the first save after a random step."""

    def wait(run: Run, strike: Fault) -> None:
        run.wait_for_step(0, _LAST)
        with run.frozen_at(moment):
            strike(run)

    return wait


MOMENTS = {
    "while it starts": while_it_starts,
    "in a step": in_a_step,
    "in evaluation": in_evaluation,
    "in the optimizer": in_the_optimizer,
    "in a data wait": in_a_data_wait,
    **{name: at(moment) for name, moment in SAVING.items()},
}

# ---------------------------------------------------------------------------- processes


def kill_rank(moment: str) -> Fault:
    """kill -9 of a random rank; torchrun restarts all ranks."""

    def fault(run: Run) -> None:
        run.start()
        MOMENTS[moment](run, Run.kill_rank)

    return fault


def kill_rank_at_the_end(run: Run) -> None:
    """kill -9 of rank 0 after the last checkpoint is published."""
    run.start()
    run.wait_for_step(STEPS - 1)

    def is_near(run_dir: Path) -> bool:
        return int(last_record(run_dir)["step"]) >= STEPS - 1

    with run.frozen_at(lambda run_dir: newest(run_dir) == f"step_{STEPS:08d}", is_near):
        run.kill_rank(0)


def kill_agent(run: Run) -> None:
    """kill -9 of torchrun at a random moment; the same command resumes."""
    run.start()
    moment = run.random.choice(sorted(MOMENTS))
    run.details.append(moment)
    MOMENTS[moment](run, Run.kill_agent)


def kill_three_times(run: Run) -> None:
    """kill -9 of a rank in three consecutive starts, in the second one during its start-up."""
    run.start()
    in_a_step(run, Run.kill_rank)
    victims = {process.pid for process in run.ranks().values()}
    run.wait_for(lambda: not victims & {process.pid for process in run.ranks().values()})
    while_it_starts(run, Run.kill_rank)
    run.wait_for(lambda: all(strike.recovered for strike in run.strikes))
    in_a_step(run, Run.kill_rank)


def kill_while_it_compiles(run: Run) -> None:
    """kill -9 of a rank that compiles with an empty compiler cache."""
    cache = compile_anew(run)
    run.wait_for(lambda: any(cache.glob("*/*")), 2 * LONG)
    time.sleep(run.random.uniform(0, 5))
    run.kill_rank()


def kill_compiler(run: Run) -> None:
    """kill -9 of a C++ compiler, as the OOM killer does: its rank reports it; all ranks restart."""
    compile_anew(run)

    found: list[tuple[int, psutil.Process]] = []

    def compiles() -> bool:
        with suppress(psutil.NoSuchProcess):  # a rank that has just ended
            found[:] = [
                (rank, child)
                for rank, process in run.ranks().items()
                for child in process.children(recursive=True)
                if compiles_a_kernel(child)
            ]
        return bool(found)

    run.wait_for(compiles, 2 * LONG)
    rank, compiler = run.random.choice(found)
    run.send(signal.SIGKILL, compiler, f"a compiler of rank {rank}")
    run.wait_for(lambda: f"[rank {rank}] error: the C++ compiler was killed" in run.output())


def compile_anew(run: Run) -> Path:
    """Start a run with compiled regions and an empty cache; return the cache's folder."""
    cache = run.dir.parent / "compiler_cache"
    run.changes["parallel__compile"] = True
    run.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    run.start()
    return cache


def stop_rank_for_good(run: Run) -> None:
    """SIGSTOP: the watchdog names the rank; the time limit of collectives ends the run."""
    run.changes["parallel__timeout_seconds"] = 10 * run.session.patience
    run.start()
    run.wait_for_step(1, _LAST)
    rank = run.pick_rank()
    victim = run.ranks()[rank]
    run.send(signal.SIGSTOP, victim, f"rank {rank}")
    message = f"pid {victim.pid}) sends no heartbeat"
    run.wait_for(lambda: message in run.output())


def stall_rank(run: Run) -> None:
    """SIGSTOP and, some seconds later, SIGCONT: nothing restarts."""
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
    """A stop signal to a rank or to torchrun saves a checkpoint; the same command resumes."""
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


def storm_of_signals(run: Run) -> None:
    """Signals to random ranks and to torchrun until all have stopped; a checkpoint is saved."""
    run.start(max_restarts=0)
    run.wait_for_step(1, _LAST)
    began = time.monotonic()
    processes = {"torchrun": run.agents()[0]}
    processes |= {f"rank {rank}": process for rank, process in run.ranks().items()}
    sent = 0
    run.strike("a storm of signals")
    while run.agents() and time.monotonic() - began < LONG:
        # Two seconds after the first signal, SIGINT means to exit at once.
        is_early = time.monotonic() - began < 1.5
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP] + [signal.SIGINT] * is_early
        with suppress(psutil.NoSuchProcess):
            run.random.choice(list(processes.values())).send_signal(run.random.choice(numbers))
            sent += 1
        time.sleep(run.random.uniform(0, 0.2))
    run.details.append(f"{sent} signals")
    _see_it_stopped(run)


def press_twice(run: Run) -> None:
    """Ctrl-C, and once more while the run saves."""
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike("Ctrl-C twice"))
    run.press(signal.SIGINT)
    time.sleep(run.random.uniform(0.05, 1))
    with suppress(ProcessLookupError, IndexError):
        run.press(signal.SIGINT)
    _see_it_stopped(run)


def close_terminal(run: Run) -> None:
    """SIGHUP saves a checkpoint; the same command resumes the run."""
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike("SIGHUP"))
    run.press(signal.SIGHUP)
    _see_it_stopped(run)


def close_terminal_under_nohup(run: Run) -> None:
    """SIGHUP to a run that nohup has started changes nothing."""
    run.under = ["nohup"]
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike("SIGHUP under nohup", restarts=False))
    run.press(signal.SIGHUP)
    run.wait_for_end()
    assert len(run.starts) == 1, "the run stopped with its terminal"


def _see_it_stopped(run: Run) -> None:
    ended = run.wait_for_end()
    status = run.status
    assert (status["state"], status["saved"]) == ("stopped", True), status
    assert "Traceback" not in ended.output, "a traceback, although the run stopped on request"
    run.start()
    run.wait_for(lambda: len(run.starts) == 2)
    assert run.starts[-1]["step"] == status["step"], "work was lost although it was saved"


def suspend(run: Run, seconds: float = 120) -> None:
    """All processes are suspended for longer than the limit of collectives, and the clock jumps."""
    run.changes["parallel__timeout_seconds"] = min(60.0, seconds / 2)
    jump = run.dir.parent / "clock_jump"
    run.environ |= {"PYTHONPATH": _first_on_path(_CLOCK), "CHAOS_CLOCK_JUMP": str(jump)}
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike(f"suspended for {seconds:g} s", restarts=False))
    with run.suspended():
        time.sleep(seconds)
        jump.write_text("86400")
    run.wait_for_end()
    assert len(run.starts) == 1, "the suspension cost a restart"


def kill_loader(run: Run) -> None:
    """kill -9 of a data loader process: its rank reports it; torchrun restarts all ranks."""
    run.start()
    run.wait_for_step(1, _LAST)
    rank = run.pick_rank()
    loader = run.random.choice(run.ranks()[rank].children(recursive=True))
    run.send(signal.SIGKILL, loader, f"a loader of rank {rank}")
    run.wait_for(lambda: "a data loader process died" in run.output())


# ---------------------------------------------------------------------------- limits


def under_limits(what: str, script: str, *, message: str = "") -> Fault:
    """Return a fault that starts the run in a shell with limits.

    Args:
        what: Description of the limits.
        script: Shell commands that set them; ``$SMALL`` is an empty folder.
        message: Expected in the output of the failing start; empty: the run must finish.
    """

    def fault(run: Run) -> None:
        small = run.dir.parent / "small"
        small.mkdir()
        script_of_run = f'set -e; SMALL={small}; {script}; exec "$@"'
        run.under = ["unshare", "--mount", "bash", "-c", script_of_run, "bash"]
        try:
            subprocess.run([*run.under, "true"], check=True, capture_output=True, timeout=LONG)
        except (OSError, subprocess.CalledProcessError):
            raise SkippedError(f"cannot set a limit here: {what}") from None
        run.details.append(what)
        run.start(max_restarts=0)
        ended = run.wait_for_end()
        assert "Traceback" not in ended.output, "a traceback instead of a line"
        if not message:
            assert len(run.starts) == 1, "the run did not finish in one start"
            return
        assert ended.code != 0, f"the run succeeded despite the limit: {what}"
        assert message in ended.output, f"not printed: {message}"
        run.under = []
        run.start()
        run.wait_for_end()

    return fault


def few_processes(run: Run) -> None:
    """44 processes and threads: the run names the limit, or a data loader process that died."""
    group = Path(f"/sys/fs/cgroup/pids/chaos-{os.getpid()}")
    try:
        group.mkdir()
        (group / "pids.max").write_text("44")
    except OSError:
        raise SkippedError("needs a control group that limits processes") from None
    try:
        run.under = ["bash", "-c", f'echo $$ >{group}/cgroup.procs; exec "$@"', "bash"]
        run.start(max_restarts=0)
        ended = run.wait_for_end()
    finally:
        group.rmdir()
    assert ended.code != 0, "the run finished despite the limit"
    messages = ("the limit of processes and threads", "a data loader process died")
    assert any(line in ended.output for line in messages), f"not printed: {' or '.join(messages)}"
    run.under = []
    run.start()
    run.wait_for_end()


# ---------------------------------------------------------------------------- disks


def full_disk(run: Run) -> None:
    """The disk of checkpoints is full: the save fails; with space, the same command resumes."""
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


def full_disk_while_saving(run: Run) -> None:
    """The disk becomes full at a random moment of a save."""
    with _own_disk(run):
        run.start(max_restarts=0)
        name = run.random.choice(sorted(SAVING))
        run.details.append(name)
        filler = run.checkpoints / "filler"
        run.wait_for(lambda: run.step >= run.starts[-1]["step"] + 1)
        with run.frozen_at(SAVING[name]):
            run.strike("disk full")
            _fill(filler)
        # A save that needs no more space still deletes an old checkpoint: fill that space, too.
        with suppress(MissedError):
            run.wait_for(lambda: _fill(filler))
        _see_it_fail(run, "No space left on device")
        filler.unlink()
        run.start()
        run.wait_for_end()


def full_disk_at_the_export(run: Run) -> None:
    """The disk has space for the last checkpoint, but not for the exported weights."""
    with _own_disk(run, of_run=True):
        run.start(max_restarts=0)
        run.wait_for_step(STEPS - 2)
        filler = run.dir / "filler"
        with run.frozen_at(lambda folder: last_record(folder)["step"] == STEPS, lambda _: True):
            run.strike("disk full")
            _fill(filler)
        ended = run.wait_for_end()
        assert ended.code != 0, "nothing is exported, but the exit code is 0"
        assert "model.safetensors: cannot be written: " in ended.output
        assert "No space left on device" in ended.output
        filler.unlink()
        run.start()
        run.wait_for_end()


def read_only(run: Run) -> None:
    """The folder of checkpoints becomes read-only, and later writable again."""
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
    assert ended.code != 0, "the save failed, but the exit code is 0"
    assert why in ended.output, f"not printed: {why}"
    assert run.status["state"] == "failed", run.status
    assert why in run.status["reason"], run.status


@contextmanager
def _own_disk(run: Run, *, of_run: bool = False) -> Iterator[None]:
    """Mount a small file system for the checkpoints of a stopped run.

    With ``of_run`` the rest of its directory gets another one.
    """
    run.take_over_stopped()
    place = run.dir if of_run else run.checkpoints
    kept = place.rename(place.with_name("kept"))
    place.mkdir()
    small = ("-t", "tmpfs", "-o", "size=16m", "tmpfs")
    try:
        _mount(*small, place)
    except (OSError, subprocess.CalledProcessError):
        raise SkippedError("needs the right to mount a small file system") from None
    try:
        if of_run:
            run.checkpoints.mkdir()
            _mount(*small, run.checkpoints)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        shutil.rmtree(kept)
        yield
        if of_run:  # for the comparison
            shutil.copytree(place, kept)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    if of_run:
        place.rmdir()
        kept.rename(place)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _fill(path: Path) -> bool:
    """Fill the file system with this file; return False, so that waiting for it never ends."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass
    return False


# ---------------------------------------------------------------------------- files


def damage(what: str, hurt: Callable[[Run, Path], str], *, message: str = "") -> Fault:
    """Return a fault that damages the newest checkpoint between two starts.

    Args:
        what: Description of the damage.
        hurt: Damages a file and returns its name.
        message: Expected in the output of the next start.
    """

    def fault(run: Run) -> None:
        run.take_over_stopped()
        newest = max(run.checkpoints.glob("step_*"))
        run.strike(f"{what}: {hurt(run, newest)}")
        run.start()
        run.wait_for_end()
        assert message in run.output(), f"not printed: {message}"

    return fault


def truncate(run: Run, checkpoint: Path) -> str:
    """Truncate a file."""
    path = _any_file(run, checkpoint)
    os.truncate(path, run.random.randrange(path.stat().st_size))
    return path.name


def lose(run: Run, checkpoint: Path) -> str:
    """Delete a file."""
    path = _any_file(run, checkpoint)
    path.unlink()
    return path.name


def flip_bit(run: Run, checkpoint: Path) -> str:
    """Flip a bit of a file."""
    path = _any_file(run, checkpoint)
    data = bytearray(path.read_bytes())
    data[run.random.randrange(len(data))] ^= 1 << run.random.randrange(8)
    path.write_bytes(data)
    return path.name


def drop_in(run: Run, checkpoint: Path) -> str:
    """Add foreign files and folders, some with names like a checkpoint's."""
    (run.checkpoints / "notes.txt").write_text("mine")
    (run.checkpoints / "step_00000099").write_text("a file")
    (checkpoint / "extra.bin").write_bytes(b"not listed")
    (run.checkpoints / f"{checkpoint.name}.bak").mkdir()
    stranger = run.checkpoints / f"step_{10**8 + 7}"
    stranger.mkdir()
    (stranger / "manifest.json").write_text(json.dumps({"format": 1}))
    return stranger.name


def lead_astray(run: Run, checkpoint: Path) -> str:
    """Make ``latest`` name a checkpoint that does not exist."""
    (run.checkpoints / "latest").write_text("step_99999999\n")
    return "latest"


def _any_file(run: Run, checkpoint: Path) -> Path:
    return run.random.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))


# ---------------------------------------------------------------------------- clock and ranks


def jump_in_time(run: Run) -> None:
    """The host's clock is set by a day, forward or back; then a rank is killed."""
    jump = run.dir.parent / "clock_jump"
    run.environ |= {"PYTHONPATH": _first_on_path(_CLOCK), "CHAOS_CLOCK_JUMP": str(jump)}
    run.start()
    run.wait_for_step(1, _LAST // 2)
    day = run.random.choice([-86400, 86400])
    jump.write_text(str(day))
    run.details.append(f"clock set by {day} s at step {run.step}")
    in_a_step(run, Run.kill_rank)


def fail_in_a_thread(run: Run) -> None:
    """A Python error in a thread of a random rank ends the run immediately with that error."""
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
    assert ended.code != 0, "the checkpoints cannot be written, but the exit code is 0"
    assert f"{run.checkpoints}" in ended.output
    assert "No such file or directory" in ended.output
    shutil.rmtree(run.dir, ignore_errors=True)  # its last status
    elsewhere.rename(run.dir)
    run.start()
    run.wait_for_end()


def delete_run(run: Run) -> None:
    """The run directory is deleted: the run fails with a message; the same command starts at 0."""
    run.start(max_restarts=0)
    in_a_step(run, lambda run: run.strike("run directory deleted"))
    while run.dir.exists():  # the run still writes files
        shutil.rmtree(run.dir, ignore_errors=True)
    ended = run.wait_for_end()
    assert ended.code != 0, "the checkpoints cannot be written, but the exit code is 0"
    assert "was removed or renamed while the run used it" in ended.output
    assert not run.dir.exists(), f"created again: {sorted(run.dir.iterdir())}"
    run.start()
    run.wait_for_end()


_FOLDERS = {
    "tensorboard": "warning: metrics cannot be written (",
    "heartbeats": "warning: heartbeats cannot be written (",
    "logs": "",
}


def lose_folders(run: Run) -> None:
    """Folders of the run directory are removed one after the other during training."""
    run.start(max_restarts=0)
    names = [*_FOLDERS, "checkpoints"]
    run.wait_for_step(SAVE_EVERY + 1, STEPS // 2)
    for name in run.random.sample(names, len(names)):
        run.wait_for_step(run.step + 1)
        run.strike(f"{name} removed", restarts=False)
        (run.dir / name).rename(run.dir.parent / name)
    run.wait_for_end()
    assert len(run.starts) == 1, "a folder that was removed cost a restart"
    for name in ("tensorboard", "heartbeats", "checkpoints"):
        assert any((run.dir / name).iterdir()), f"{name} was not created again"


def replace_folders(run: Run) -> None:
    """A file that replaces a folder during training causes one warning and ends nothing."""
    run.start(max_restarts=0)
    run.wait_for_step(1, _LAST)
    name = run.random.choice(sorted(_FOLDERS))
    run.strike(f"{name} replaced by a file", restarts=False)
    (run.dir / name).rename(run.dir.parent / name)
    (run.dir / name).write_text("a file")
    run.wait_for_end()
    assert len(run.starts) == 1, "a folder that cannot be written cost a restart"
    message = _FOLDERS[name]
    assert not message or run.output().count(message) == 1, f"not printed once: {message}"
    (run.dir / name).unlink()
    (run.dir.parent / name).rename(run.dir / name)


def replace_metrics(run: Run) -> None:
    """While metrics.jsonl is a folder, the run warns and continues without records."""
    run.changes["checkpoint__every"] = STEPS  # the next start repeats the steps without a record
    run.start(max_restarts=0)
    run.wait_for_step(1, _LAST)
    run.strike("metrics.jsonl replaced by a folder")
    metrics, kept = run.dir / "metrics.jsonl", run.dir / "kept.jsonl"
    metrics.rename(kept)
    with suppress(FileExistsError):  # the run may have begun a new file
        metrics.mkdir()
    if metrics.is_file():
        metrics.unlink()
        metrics.mkdir()
    run.wait_for(lambda: "metrics cannot be written (Is a directory: " in run.output())
    run.send(signal.SIGKILL, run.agents()[0], "torchrun")
    run.wait_for_end()
    metrics.rmdir()
    kept.rename(metrics)
    run.start()
    run.wait_for_end()


def change_ranks(run: Run) -> None:
    """2, 1 and 3 ranks in three starts of one run, stopped or killed in between."""
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
    """One of two agents is killed: the other continues alone."""
    port = free_port()
    run.start_agent(0, port)
    run.start_agent(1, port)
    in_a_step(run, lambda run: run.kill_agent(1))
    run.wait_for_end(3 * LONG)
    worlds = [start["world_size"] for start in run.starts]
    assert worlds == [2, 1], f"ranks along the run: {worlds}"


def add_agent(run: Run) -> None:
    """A second agent joins: both continue together."""
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
    "kill a compiler": kill_compiler,
    "kill ranks three times": kill_three_times,
    "kill the agent": kill_agent,
    "stop a rank for good": stop_rank_for_good,
    "stall a rank": stall_rank,
    "ask to stop": ask_to_stop,
    "storm of signals": storm_of_signals,
    "Ctrl-C twice": press_twice,
    "closed terminal": close_terminal,
    "closed terminal under nohup": close_terminal_under_nohup,
    "suspended computer": suspend,
    "kill a loader": kill_loader,
    "few file descriptors": under_limits("64 open files", "ulimit -n 64"),
    "tiny /dev/shm": under_limits(
        "64 KiB in /dev/shm",
        "mount -t tmpfs -o size=64k none /dev/shm",
        message="error: /dev/shm: 0.1 MiB are free",
    ),
    "no room in TMPDIR": under_limits(
        "a full TMPDIR",
        "mount -t tmpfs -o size=4k none $SMALL; echo full > $SMALL/file; export TMPDIR=$SMALL",
    ),
    "little address space": under_limits(
        "700,000 KiB of address space", "ulimit -v 700000", message="error: out of memory: "
    ),
    "few processes": few_processes,
    "full disk": full_disk,
    "full disk while saving": full_disk_while_saving,
    "full disk at the export": full_disk_at_the_export,
    "read-only checkpoints": read_only,
    "truncated checkpoint": damage("truncated", truncate, message="skipped, damaged or incomplete"),
    "incomplete checkpoint": damage("lost", lose, message="skipped, damaged or incomplete"),
    "flipped bit": damage("bit flipped", flip_bit, message="skipped, damaged or incomplete"),
    "foreign files": damage("dropped in", drop_in),
    "latest names nothing": damage("overwritten", lead_astray),
    "clock jump": jump_in_time,
    "an error in a thread": fail_in_a_thread,
    "run directory renamed": move_run,
    "run directory deleted": delete_run,
    "folders removed": lose_folders,
    "folders replaced by files": replace_folders,
    "metrics.jsonl replaced by a folder": replace_metrics,
    "other numbers of ranks": change_ranks,
    "lose one of two agents": lose_agent,
    "add an agent": add_agent,
}
