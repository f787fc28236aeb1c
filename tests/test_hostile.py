"""Crafted files lead to a one-line error, within limits of time and memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_dist.checkpoint.__main__ import main as checkpoint_command
from jepa_dist.checkpoint.manifest import STATE, read_manifest, read_state
from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.monitor.alarms import JepaAlarms
from jepa_dist.monitor.history import RunHistory, read_starts
from jepa_dist.monitor.run_dir import check_run_files, read_status, record_failure, write_run_dir
from jepa_dist.monitor.watchdog import read_heartbeats
from jepa_dist.monitor.writer import MetricsWriter
from jepa_dist.parallel.world import start_world
from jepa_dist.report.compare import pairing, summary
from jepa_dist.report.runs import read_runs
from jepa_dist.run.progress import run_state
from jepa_dist.start.resume import find_start
from jepa_dist.sweep.members import Member
from jepa_dist.sweep.results import read_results
from jepa_dist.sweep.verdicts import describe
from tests.support.crafted import (
    CONTENTS,
    MANIFESTS,
    RUN_FILES,
    STATES,
    SURPRISES,
    Spoil,
    make_checkpoint,
)
from tests.support.limits import Outcome, run_limited
from tests.support.ranks import run_ranks

# Valid input of this size takes some ten milliseconds and megabytes; the machine may be busy.
SECONDS, MEGABYTES = 20.0, 1000
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_checkpoint(folder, 3)
    make_checkpoint(folder, 8)
    return folder


@pytest.fixture
def checkpoints(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def in_turn(*calls: Callable[[], object]) -> Callable[[], None]:
    """Run all calls, whatever the earlier ones raise; print one problem each."""

    def call() -> None:
        for one in calls:
            try:
                one()
            except UserError as error:
                print(*error.problems, sep="\n")
            except OSError as error:  # of readers that only run after check_run_files
                print(error.strerror)
            except SystemExit as exit_:
                print("exit code", exit_.code)

    return call


def assert_ended_well(outcome: Outcome) -> None:
    assert outcome.kind in ("ok", "refused"), f"{outcome.kind}: {outcome.text[-3000:]}"
    assert all(line.isprintable() and len(line) < 2000 for line in outcome.lines), outcome.lines


# ---------------------------------------------------------------------------- checkpoints


def commands(path: Path) -> Callable[[], None]:
    """Run every command that reads a checkpoint without the run."""
    good, out = path.with_name("step_00000003"), path.parent / "out"
    return in_turn(
        lambda: checkpoint_command(["verify", str(path)]),
        lambda: checkpoint_command(["ls", str(path.parent)]),
        lambda: checkpoint_command(["diff", str(good), str(path)]),
        lambda: checkpoint_command(["export", str(path), str(out)]),
        lambda: run_state(path / STATE, read_state(path)),
        lambda: checkpoint_command(["prune", str(path.parent), "--keep-last", "1", "--dry-run"]),
    )


@pytest.mark.parametrize("spoil", MANIFESTS.values(), ids=MANIFESTS)
def test_crafted_checkpoints(checkpoints: Path, spoil: Spoil) -> None:
    path = checkpoints / "step_00000008"
    spoil(path)
    outcome = run_limited(commands(path), SECONDS, MEGABYTES)
    assert_ended_well(outcome)
    assert f"{path}: intact" not in outcome.lines or "damaged" in outcome.text, outcome.text
    assert not (checkpoints / "out" / "model.json").exists()


def test_sound_checkpoints_pass_under_the_same_limits(checkpoints: Path) -> None:
    path = checkpoints / "step_00000008"
    outcome = run_limited(commands(path), SECONDS, MEGABYTES)
    assert outcome.kind == "ok"
    assert outcome.lines[0] == f"{path}: intact"
    assert "damaged" not in outcome.text
    assert (checkpoints / "out" / "model.json").exists()


def starts(rank: int, world_size: int, folders: list[str]) -> list[tuple[str, ...]]:
    """Return the messages of ``find_start`` for each run directory on this rank."""
    config = Config()
    world = start_world(config.parallel)
    messages = []
    for folder in folders:
        try:
            found = find_start(config, Path(folder), "data", world)
            messages.append(found.messages)
        except UserError as error:
            messages.append(error.problems)
    return messages


def test_states_of_the_wrong_type_or_shape_are_one_line_on_every_rank(
    sound: Path, tmp_path: Path
) -> None:
    folders = {name: tmp_path / str(i) for i, name in enumerate(STATES)}
    for name, folder in folders.items():
        shutil.copytree(sound / "step_00000008", folder / "checkpoints" / "step_00000008")
        STATES[name][0](folder / "checkpoints" / "step_00000008")
    first, second = run_ranks(starts, 2, [str(folder) for folder in folders.values()])
    assert first == second
    for (name, folder), problems in zip(folders.items(), first, strict=True):
        file = folder / "checkpoints" / "step_00000008" / "state.json"
        word = STATES[name][1]
        if word == "config" and name in ("config nested 150 deep", "a key with a newline"):
            assert all(problem.isprintable() for problem in problems)
            continue  # unknown keys are reported as changed, or refused
        (problem,) = problems
        assert problem.startswith(f"{file}: "), (name, problem)
        assert word in problem, (name, problem)
        assert problem.isprintable()
        assert len(problem) < 500


@pytest.mark.parametrize("spoil", [s for s, _ in STATES.values()], ids=list(STATES))
def test_states_under_the_limits(checkpoints: Path, spoil: Spoil) -> None:
    path = checkpoints / "step_00000008"
    spoil(path)
    assert_ended_well(run_limited(commands(path), SECONDS, MEGABYTES))


# ---------------------------------------------------------------------------- run directories


def make_run(folder: Path) -> Path:
    run = folder / "run"
    for name in ("heartbeats", "logs"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "data.json").write_text('{"train": {"digest": "1"}, "val": {"digest": "2"}}')
    (run / "status.json").write_text('{"state": "running", "step": 3, "saved": true}')
    (run / "metrics.jsonl").write_text('{"step": 3, "loss/ce": 2.0, "val/loss": 1.0}\n')
    (run / "starts.jsonl").write_text(
        '{"time": 1.0, "step": 0, "world_size": 1, "after_failure": false}\n'
    )
    (run / "heartbeats" / "rank_0.json").write_text(
        '{"beat": 1, "count": 1, "step": 1, "phase": "x", "seconds": 0.5, "host": "h", "pid": 1}'
    )
    return run


def read_everything(run: Path) -> Callable[[], None]:
    """Call all readers of a run directory, and the writers that continue its files."""
    config = run.parent / "base.yaml"
    config.touch()
    member = Member(0, "control", 1, str(config), {"run.dir": str(run), "seed": 1})

    def report() -> None:
        runs = read_runs([run])
        for _, cells in summary(runs):
            for cell in cells:
                assert cell.isprintable()
        assert pairing([runs[0], runs[0]]) is not None
        for one in runs:
            one.cosines()

    def history() -> None:
        RunHistory(run, 3, 1, read_status(run).get("state")).record(1.0, 1.0)

    def writer() -> None:
        warnings: list[str] = []
        MetricsWriter(run, 3, warnings.append).close()

    return in_turn(
        lambda: check_run_files(run),
        lambda: print(*describe(read_results([member])), sep="\n"),
        report,
        lambda: record_failure(run, 0, "a reason"),
        lambda: read_heartbeats(run / "heartbeats", 1),
        lambda: JepaAlarms(1e-5, 0.25).recall(run / "metrics.jsonl"),
        history,
        writer,
        lambda: write_run_dir(run, {"config.yaml": "seed: 1\n", "status.json": "{}"}),
    )


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_contents_of_run_files(tmp_path: Path, content: bytes) -> None:
    names = [name for name in RUN_FILES if name != "config.yaml"]  # YAML: tests of the config
    runs = [make_run(tmp_path / str(i)) for i in range(len(names))]
    for run, name in zip(runs, names, strict=True):
        (run / name).write_bytes(content)
    everything = in_turn(*(read_everything(run) for run in runs))
    assert_ended_well(run_limited(everything, SECONDS, MEGABYTES))


@pytest.mark.parametrize("kind", [kind for kind in SURPRISES if kind != "terabyte"])
def test_special_files_among_run_files(tmp_path: Path, kind: str) -> None:
    """No reader may open them; ``check_run_files`` names them before a rank starts."""
    runs = [make_run(tmp_path / str(i)) for i in range(len(RUN_FILES))]
    for run, name in zip(runs, RUN_FILES, strict=True):
        (run / name).unlink()
        SURPRISES[kind](run / name)
    outcome = run_limited(in_turn(*(read_everything(run) for run in runs)), SECONDS, MEGABYTES)
    assert_ended_well(outcome)
    if kind in ("FIFO", "device", "folder"):
        for run, name in zip(runs, RUN_FILES[:-1], strict=False):
            message = f"{run / name}: not a regular file; move it away, or name another run.dir"
            assert message in outcome.lines


@pytest.mark.parametrize("name", ["checkpoints", "logs", "heartbeats", "tensorboard"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).touch()
    with pytest.raises(UserError, match="not a folder; move it away"):
        check_run_files(run)


def test_a_sound_run_passes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    check_run_files(run)
    assert [start.step for start in read_starts(run)] == [0]
    assert read_heartbeats(run / "heartbeats", 1)[0].host == "h"
    outcome = run_limited(read_everything(run), SECONDS, MEGABYTES)
    assert outcome.kind == "ok"
    assert "error" not in outcome.text


def test_manifests_and_states_that_a_run_writes_are_read(checkpoints: Path) -> None:
    path = checkpoints / "step_00000008"
    assert read_manifest(path).step == 8
    state = run_state(path / STATE, read_state(path))
    assert (state.progress.step, state.progress.bad_in_row) == (8, 0)
