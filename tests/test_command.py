"""The command ``jepa_dist``: from any folder, from a wheel, and shipped configurations by name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from jepa_dist.__main__ import _SUBCOMMANDS, main
from jepa_dist.config import load
from jepa_dist.errors import UserError
from jepa_dist.shipped import find_config, find_sweep
from jepa_dist.sweep.members import read_sweep
from tests.support.patience import patience
from tests.support.tiny import REPOSITORY

DOCS = REPOSITORY / "docs"


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
    )


def test_the_overview_names_every_subcommand_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from jepa_dist.__main__ import main; main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = call(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, subcommand in _SUBCOMMANDS.items():
        assert f"  {name} " in done.stdout
        assert subcommand.summary in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["tasks", "--help"]])
def test_a_closed_pipe_ends_it_quietly(arguments: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as after | head
    with os.fdopen(writer) as output:
        done = subprocess.run(
            [sys.executable, "-m", "jepa_dist", *arguments],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=patience(60),
            check=False,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("name", _SUBCOMMANDS)
def test_help_has_two_examples_and_a_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jepa_dist"])
    for stream in ("stdout", "stderr"):  # training replaces them
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert not caught.value.code
    shown = capfd.readouterr().out
    subcommand = _SUBCOMMANDS[name]
    assert shown.startswith(f"usage: jepa_dist {name} ")
    assert all(f"\n  {example}\n" in shown for example in subcommand.examples)
    assert shown.endswith(f"More: docs/{subcommand.page}\n")
    assert (DOCS / subcommand.page).is_file()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no subcommand; expected one of train, "),
        (["tarin"], "unknown subcommand 'tarin'; expected one of"),
    ],
)
def test_unknown_subcommands(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: command line: {problem}")
    assert err.count("\n") == 1


def test_shipped_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    debug = REPOSITORY / "configs/debug.yaml"
    for name in ("debug", "debug.yaml", "configs/debug.yaml", debug):
        assert load(name, [], {}).config == load(debug, [], {}).config
    (tmp_path / "debug").mkdir()
    assert find_config("debug").samefile(debug)
    (tmp_path / "debug.yaml").write_text("seed: 7\n")
    assert load("debug.yaml", [], {}).config.seed == 7
    assert find_config("elsewhere/gpt_36m.yaml") == Path("elsewhere/gpt_36m.yaml")
    with pytest.raises(UserError, match=r"gpt_35m: no such file.* one of debug, gpt_1b, "):
        find_config("gpt_35m")
    with pytest.raises(UserError, match=r"one of debug, .* then KEY=VALUE; e.g. debug seed=3"):
        find_config("seed=3")
    assert find_config("seed=3/run.yaml") == Path("seed=3/run.yaml")
    assert find_sweep("jepa_debug").samefile(REPOSITORY / "configs/sweeps/jepa_debug.yaml")
    with pytest.raises(UserError, match="one of jepa_36m, jepa_debug"):
        find_sweep("debug_jepa")


def test_a_shipped_sweep_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_sweep(Path("jepa_debug"))) == 12


def test_subcommands_read_their_own_arguments(tmp_path: Path) -> None:
    done = call(
        *(sys.executable, "-m", "jepa_dist", "train", "debug", "--print-config", "seed=5"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("seed: 5 ")
    failed = call(sys.executable, "-m", "jepa_dist", "train", "debug", "sed=5", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: command line: sed: unknown key")


@pytest.mark.slow
def test_a_wheel_in_another_environment(tmp_path: Path) -> None:
    """``pip install .``, with the dependencies of this environment, run in an empty folder."""
    source, environment, elsewhere = (tmp_path / n for n in ("source", "venv", "elsewhere"))
    source.mkdir()
    elsewhere.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "jepa_dist", source / "jepa_dist", ignore=ignored)
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin/python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    done = call(*install, "--disable-pip-version-check", source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # After the wheel in the order of folders, so that the package is the wheel's.
    packages = next(environment.glob("lib/python*/site-packages"))
    dependencies = Path(pytest.__file__).parent.parent
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    where = "import jepa_dist; print(jepa_dist.__file__)"
    assert str(packages) in call(python, "-c", where, cwd=elsewhere).stdout
    command = environment / "bin/jepa_dist"
    shown = call(command, "train", "gpt_36m", "--print-config", cwd=elsewhere)
    assert shown.returncode == 0, shown.stderr
    assert "model.num_layers: 11 " in shown.stdout
    assert str(packages / "jepa_dist/configs/gpt_36m.yaml") in shown.stdout
    members = call(command, "sweep", "list", "jepa_debug", cwd=elsewhere)
    assert len(members.stdout.splitlines()) == 12, members.stderr
    unknown = call(command, "evaluate", "nowhere", cwd=elsewhere)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: nowhere: no such file or folder")
