"""launch/tensorboard.sh: its command, address and port, and rejected arguments."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest

from tests.support.commands import Command, Finished, run_command
from tests.support.tiny import REPOSITORY


@contextmanager
def listener(port: int = 0) -> Iterator[int]:
    """Take a port of the loopback interface."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield taken.getsockname()[1]


def is_free(port: int) -> bool:
    try:
        with listener(port):
            return True
    except OSError:
        return False


def start(*arguments: object, **environ: object) -> Finished:
    command = ["bash", REPOSITORY / "launch/tensorboard.sh", *arguments]
    return run_command(*command, cwd=Path("/"), environ={"VENV": sys.prefix, **environ})


def planned(*arguments: object, **environ: object) -> list[str]:
    finished = start("--dry-run", *arguments, **environ)
    assert finished.code == 0, finished.output
    return shlex.split(finished.output)


def test_dry_run(tmp_path: Path) -> None:
    with listener() as port:
        pass
    assert planned(tmp_path, PORT=port) == [
        *(f"{sys.prefix}/bin/tensorboard", "--logdir", str(tmp_path)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A requested port must be free; without a request, the next free one is used."""
    with listener() as port:
        finished = start(tmp_path, PORT=port)
        assert finished.code == 2
        assert f"PORT={port}: name another port" in finished.output
        assert f"127.0.0.1:{port}" in finished.output
    if is_free(6006):
        with listener(6006):
            assert int(planned(tmp_path)[-1]) > 6006


def test_other_addresses_are_asked_for(tmp_path: Path) -> None:
    assert planned(tmp_path, HOST="0.0.0.0")[4] == "0.0.0.0"
    refused = start(tmp_path, HOST="host.invalid", PORT=6006)
    assert refused.code == 2
    assert "error: cannot listen at host.invalid:6006" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["/no/such/runs"], {}, "/no/such/runs: no such folder; name the one that holds"),
        (["/tmp", "/usr"], {}, "/tmp and /usr: give one folder"),
        (["--logdir"], {}, "--logdir: unknown option; --help"),
        (["/tmp"], {"VENV": "/nowhere"}, "/nowhere/bin/tensorboard: not installed; bash launch/"),
        (["/tmp"], {"PORT": "http"}, "PORT=http: expected a port"),
        (["/tmp"], {"PORT": "70000"}, "PORT=70000: expected a port"),
    ],
)
def test_refused(arguments: list[str], environ: dict[str, str], expected: str) -> None:
    finished = start(*arguments, **environ)
    assert finished.code == 2
    assert finished.output.startswith(f"error: {expected}")


def test_help() -> None:
    finished = start("--help")
    assert finished.code == 0
    assert "bash launch/tensorboard.sh" in finished.output
    assert "set -e" not in finished.output


@pytest.mark.slow
def test_it_serves_this_machine_alone(tmp_path: Path) -> None:
    """The page is there, at the printed address, which is loopback; the ssh line leads to it."""
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    (tmp_path / "runs").mkdir()
    launch = ["bash", tmp_path / "launch/tensorboard.sh"]
    with Command(launch, environ={"VENV": sys.prefix}) as command:
        command.wait_for(lambda: "ssh -N -L" in command.output(), 60)
        match = re.search(r"runs in runs: (http://127\.0\.0\.1:(\d+))", command.output())
        assert match is not None, command.output()
        url, port = match.groups()
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in command.output()
        command.wait_for(lambda: answers(url), 120)
        listening = [
            connection.laddr
            for process in command.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return b"TensorBoard" in page.read()
    except (URLError, OSError):
        return False
