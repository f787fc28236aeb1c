"""The scripts in launch/: set-up, and the commands that they run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.commands import Command, Finished, run_command
from tests.support.tiny import REPOSITORY, tiny_overrides

PROJECT = """
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "jepa_dist"
version = "0"

[project.optional-dependencies]
dev = ["iniconfig"]

[tool.setuptools]
py-modules = []
"""


def checkout(folder: Path) -> Path:
    """Copy the scripts into a project of the same name that installs in seconds."""
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    (folder / "configs").mkdir()
    shutil.copy(REPOSITORY / "configs/debug.yaml", folder / "configs")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "constraints.txt").write_text("iniconfig==2.0.0\n")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return checkout(tmp_path / "a project")  # with a space, as folders of users have


def setup(project: Path, *arguments: str, **environ: object) -> Finished:
    return run_command(
        "bash", project / "launch/setup.sh", *arguments, cwd=Path("/"), environ=_own(environ)
    )


def _own(environ: dict[str, object]) -> dict[str, object]:
    """Unset the environment that CI names for all scripts."""
    return {"VENV": "", "PYTHON": sys.executable, **environ}


# ---------------------------------------------------------------------------- set-up


@pytest.mark.parametrize("python", ["/nowhere/python3", "false"])
def test_unsuitable_python(project: Path, python: str) -> None:
    finished = setup(project, PYTHON=python)
    assert finished.code == 1
    assert f"'{python}': expected Python 3.11 or later" in finished.output
    assert not (project / ".venv").exists()


def test_foreign_folder_is_refused(project: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("three years")
    finished = setup(project, VENV=mine)
    assert finished.code == 1
    assert f"{mine} exists and is not a virtual environment" in finished.output
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_unknown_extra(project: Path) -> None:
    finished = setup(project, "devel")
    assert finished.code == 1
    assert "unknown extra 'devel'" in finished.output


@pytest.mark.slow
def test_set_up_happens_once(project: Path) -> None:
    """One that is killed is repaired; of two at once, one does the work."""
    python, state = project / ".venv/bin/python", project / ".venv/.jepa_dist"
    command = ["bash", project / "launch/setup.sh"]

    def version(package: str) -> str:
        program = f"from importlib.metadata import version; print(version('{package}'))"
        return run_command(python, "-c", program, cwd=Path("/")).output.strip()

    with Command(command, environ=_own({})) as killed:
        killed.wait_for(lambda: state.exists() and state.read_text() == "interrupted\n", 60)
        # Leaving the block kills everything.
    assert state.read_text() == "interrupted\n"

    with Command(command, environ=_own({})) as one, Command(command, environ=_own({})) as other:
        both = [one.wait(120), other.wait(120)]
    assert [finished.code for finished in both] == [0, 0], both
    (first,) = [finished for finished in both if "installing" in finished.output]
    assert "creating" in first.output
    assert first.output.endswith("done\n")
    assert version("jepa_dist") == "0"

    again = setup(project)
    assert (again.code, again.output) == (0, "")

    more = setup(project, "dev")
    assert more.code == 0, more.output
    assert "creating" not in more.output
    assert version("iniconfig") == "2.0.0", "as constraints.txt says"
    assert setup(project, "dev").output == ""
    assert setup(project).output == "", "with more than asked for"

    (project / "constraints.txt").write_text("iniconfig==2.1.0\n")
    changed = setup(project, "dev")
    assert changed.code == 0, changed.output
    assert "creating" not in changed.output
    assert version("iniconfig") == "2.1.0"

    moved = project.rename(project.with_name("moved"))
    finished = setup(moved)
    assert finished.code == 0, finished.output
    assert "creating" in finished.output
    assert run_command(moved / ".venv/bin/pip", "--version").code == 0


def test_failed_set_up_is_reported(project: Path) -> None:
    """With pip's own complaint, and without starting to train."""
    bin_folder = project / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (project / ".venv/pyvenv.cfg").touch()
    fails_to_install = 'case "$*" in *--version) ;; *) echo "no such package"; exit 1 ;; esac'
    script(bin_folder / "python", fails_to_install)
    finished = debug(project)
    assert finished.code == 1
    assert "no such package" in finished.output
    assert "set-up: the installation failed" in finished.output
    assert not (project / "data").exists()


# ---------------------------------------------------------------------------- debug.sh


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def debug(project: Path, *arguments: object, **environ: object) -> Finished:
    return run_command(
        "bash", project / "launch/debug.sh", *arguments, cwd=Path("/"), environ=_own(environ)
    )


def planned(project: Path, *arguments: object, **environ: object) -> list[list[str]]:
    """Return the commands that a dry run prints, as lists of words."""
    environ = {"OMP_NUM_THREADS": "", **environ}
    finished = debug(project, "--dry-run", *arguments, **environ)
    assert finished.code == 0, finished.output
    assert not (project / ".venv").exists()
    return [shlex.split(line) for line in finished.output.splitlines()]


def test_dry_run(project: Path) -> None:
    verbatim = "data.train='x' $(touch trace) `touch trace`; *"
    setting_up, preparing, training = planned(project, "jepa.lambda=0.1", verbatim)
    assert setting_up == ["bash", "launch/setup.sh"]
    assert preparing == [".venv/bin/python", "-m", "jepa_dist.data.prepare"]
    assert training[0] == "env"
    assert training[2:] == [
        *(".venv/bin/torchrun", "--rdzv-backend=loopback", "--nproc-per-node=2"),
        *("-m", "jepa_dist.train"),
        *("configs/debug.yaml", "run.dir=runs/debug", "jepa.lambda=0.1", verbatim),
    ]
    assert not (project / "runs").exists()


def test_ranks_and_threads(project: Path) -> None:
    def of(**environ: object) -> tuple[int, str]:
        training = planned(project, **environ)[-1]
        threads = int(training[1].removeprefix("OMP_NUM_THREADS="))
        return threads, training[4]

    cores = int(run_command("nproc", environ={"OMP_NUM_THREADS": ""}).output)
    assert of() == (max(1, cores // 2), "--nproc-per-node=2")
    assert of(NPROC_PER_NODE=1) == (cores, "--nproc-per-node=1")
    assert of(NPROC_PER_NODE=999) == (1, "--nproc-per-node=999")
    assert of(OMP_NUM_THREADS=7) == (7, "--nproc-per-node=2")


@pytest.mark.parametrize("ranks", ["0", "many", "-1"])
def test_not_a_number_of_ranks(project: Path, ranks: str) -> None:
    finished = debug(project, NPROC_PER_NODE=ranks)
    assert finished.code == 2
    assert finished.output == f"error: NPROC_PER_NODE={ranks}: expected a number of ranks\n"


def test_corpus_is_prepared_only_if_missing(project: Path) -> None:
    (project / "data/stdlib").mkdir(parents=True)
    (project / "data/stdlib/meta.json").touch()
    finished = debug(project, "--dry-run")
    assert "prepare" not in finished.output


def test_run_directories_are_numbered(project: Path) -> None:
    def run_dir(*arguments: object) -> list[str]:
        return [word for word in planned(project, *arguments)[-1] if word.startswith("run.dir=")]

    assert run_dir() == ["run.dir=runs/debug"]
    (project / "runs/debug").mkdir(parents=True)
    assert run_dir() == ["run.dir=runs/debug-2"]
    (project / "runs/debug-2").mkdir()
    (project / "runs/debug-4").mkdir()
    assert run_dir() == ["run.dir=runs/debug-3"]
    assert run_dir("run.dir=runs/my run") == ["run.dir=runs/my run"]


@pytest.mark.parametrize("name", ["debug.sh", "test.sh"])
def test_help(project: Path, name: str) -> None:
    finished = run_command("bash", project / "launch" / name, "--help", cwd=Path("/"))
    assert finished.code == 0
    assert f"bash launch/{name}" in finished.output
    assert "set -e" not in finished.output


@pytest.fixture
def trainable(project: Path) -> Path:
    """A project that uses our own installation and has a small corpus."""
    script(project / "launch/setup.sh", "echo set-up")
    text = project / "text.txt"
    text.write_text("\n\n".join(f"Document {n}: {n * n} is the square." for n in range(2000)))
    corpus = [text, "--separator", r"\n\n", "--val-fraction", "0.1", "--out", "data/stdlib"]
    prepare = [sys.executable, "-m", "jepa_dist.data.prepare", *corpus]
    assert run_command(*prepare, cwd=project).code == 0
    return project


@pytest.mark.slow
def test_debug_runs_have_directories_of_their_own(trainable: Path) -> None:
    kept = ("run.dir=", "data.train=", "data.val=")
    changes = {"train__steps": 4, "train__log_every": 2}
    settings = [s for s in tiny_overrides(trainable, **changes) if not s.startswith(kept)]
    finished = debug(trainable, *settings, VENV=sys.prefix)
    assert finished.code == 0, finished.output
    assert finished.output.startswith("set-up\n")
    assert "preparing" not in finished.output
    assert "run directory: runs/debug\n" in finished.output
    assert f"--logdir {shlex.quote(str(trainable / 'runs'))}\n" in finished.output
    lines = (trainable / "runs/debug/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["final"] is True
    assert " run.dir=runs/debug-2" in debug(trainable, "--dry-run", VENV=sys.prefix).output


def test_user_errors_are_printed_before_torchrun_starts(trainable: Path) -> None:
    finished = debug(trainable, "jepa.lamda=1", "seed=x", VENV=sys.prefix)
    assert finished.code == 2
    lines = finished.output.splitlines()
    assert len(lines) == 3
    assert lines[0] == "set-up"
    assert lines[1].startswith("error: command line: jepa.lamda: unknown key")
    assert lines[2].startswith("error: command line: seed='x': ")
    assert not (trainable / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("batch.sequences=1", "error: batch.sequences=1: the global batch needs at least one"),
        ("data.train=/nowhere/*.bin", "error: data.train='/nowhere/*.bin': no token shard"),
    ],
)
def test_faults_beyond_the_configuration_are_reported_before_torchrun(
    trainable: Path, setting: str, problem: str
) -> None:
    finished = debug(trainable, setting, VENV=sys.prefix)
    assert finished.code == 2
    reports = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(reports) == 1, finished.output
    assert reports[0].startswith(problem)
    assert "torchrun" not in finished.output


# ---------------------------------------------------------------------------- test.sh


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["-k", "two words"], ["-k", "two words"]),
        (["--all"], ["-m", "not gpu and not cuda_build"]),
        (["--all", "-x"], ["-m", "not gpu and not cuda_build", "-x"]),
    ],
)
def test_the_test_command(project: Path, arguments: list[str], expected: list[str]) -> None:
    script(project / "launch/setup.sh", 'echo "set-up $*"')
    script(project / ".venv/bin/python", 'printf "%s\\n" "$OMP_NUM_THREADS" "$@"')
    command = ["bash", project / "launch/test.sh", *arguments]
    finished = run_command(*command, cwd=Path("/"), environ=_own({}))
    assert finished.code == 0, finished.output
    workers = ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder", "--durations", "25"]
    assert finished.output.splitlines() == ["set-up dev", "1", "-m", "pytest", *workers, *expected]
