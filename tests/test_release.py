"""The release install, the check for known vulnerabilities, and rules about the tests' files."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from tests.support.tiny import REPOSITORY

LOCK = (REPOSITORY / "requirements.lock").read_text()
AUDIT = runpy.run_path(str(REPOSITORY / "launch/audit.py"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    packages = re.split(r"\n(?=[A-Za-z])", LOCK)[1:]
    assert all("    --hash=sha256:" in package for package in packages)
    found = [re.match(r"([A-Za-z0-9_.-]+)==([^ ]+)", package) for package in packages]
    return {canonical(each[1]): each[2] for each in found if each}


def test_the_lock_is_that_of_constraints_and_dependencies() -> None:
    versions = locked()
    pins = re.findall(r"^([^#=]+)==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    pinned = {canonical(name): version for name, version in pins}
    assert {n: v for n, v in versions.items() if n in pinned and pinned[n] != v} == {}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    script = (REPOSITORY / "launch/lock.sh").read_text()
    locked_extras = set(re.findall(r"--extra ([\w-]+)", script))
    assert locked_extras == extras.keys() - {"dev", "lm-eval"}
    needed = [*project["dependencies"], *(p for e in locked_extras for p in extras[e])]
    names = {canonical(re.split(r"[<>=!~ ;\[]", each)[0]) for each in needed}
    assert names <= versions.keys(), "bash launch/lock.sh"


def test_the_lock_names_no_place_to_download_from() -> None:
    lines = [line.strip() for line in LOCK.splitlines() if not line.startswith("#")]
    assert all(re.match(r"([A-Za-z0-9_.-]+==|--hash=sha256:[0-9a-f]{64}( \\)?$)", x) for x in lines)
    assert not any("/" in line or "index" in line.split("==")[0] for line in lines)


def test_guarantees_name_tests_that_exist() -> None:
    named = set(re.findall(r"test_\w+\.py", (REPOSITORY / "SECURITY.md").read_text()))
    assert len(named) > 10
    assert {name for name in named if not (REPOSITORY / "tests" / name).is_file()} == set()


def test_no_test_imports_another() -> None:
    """What tests share is in tests/support."""
    tests = REPOSITORY / "tests"
    wrong = [
        f"{path.relative_to(tests)} imports {name}"
        for path in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    ]
    assert wrong == []


def imported(node: ast.AST) -> list[str]:
    """Return what an import statement names, as MODULE or MODULE.NAME; [] for other code."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_vulnerabilities_are_listed_and_an_empty_audit_is_skipped() -> None:
    known = {"id": "CVE-1", "fix_versions": ["2.1"]}
    package = {"name": "a", "version": "2.0", "vulns": [known, {"id": "X", "fix_versions": []}]}
    unknown = {"name": "b", "skip_reason": "not found"}
    lines, audited = AUDIT["findings"]({"dependencies": [package, unknown]})
    assert lines == ["a 2.0: CVE-1, fixed in 2.1", "a 2.0: X, fixed in no version"]
    assert audited == 1
    with pytest.raises(AUDIT["SkippedError"], match="answers for none of the 1 packages"):
        AUDIT["findings"]({"dependencies": [unknown]})


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ("", "x/python: No module named pip_audit", "pip-audit is not installed; python -m pip"),
        ("", "Traceback\nConnectionError: no route", "pip-audit failed: ConnectionError: no route"),
    ],
)
def test_what_cannot_be_checked_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdout: str,
    stderr: str,
    reason: str,
) -> None:
    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", answer)
    for arguments, code in (([], 0), (["--required"], 1)):
        monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
        assert AUDIT["main"]() == code
        assert capsys.readouterr().out.startswith(f"audit: skipped: {reason}")
