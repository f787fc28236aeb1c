"""Compare requirements.lock with the published vulnerabilities of packages.

    python launch/audit.py [--required]

Uses pip-audit (``python -m pip install pip-audit``), which asks a service in the network. Where it
is not installed, or the service does not answer, the check is skipped with the reason, exit code 0;
``--required`` makes that a failure. Exit code 1: vulnerabilities were found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements.lock"
_SECONDS = 300


class SkippedError(Exception):
    """The check is not possible here."""


def main() -> int:
    """Run the command; returns the exit code."""
    is_required = sys.argv[1:] == ["--required"]
    if sys.argv[1:] and not is_required:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found, audited = findings(ask(LOCK))
    except SkippedError as reason:
        print(f"audit: skipped: {reason}")
        return int(is_required)
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"audit: {len(found)} known vulnerabilities in {audited} packages")
    return int(bool(found))


def ask(lock: Path) -> Any:
    """Return pip-audit's report.

    Raises:
        SkippedError: it is not installed, or gives none.
    """
    command = [
        *(sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes"),
        *("--requirement", str(lock), "--format", "json", "--progress-spinner", "off"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise SkippedError(f"no answer within {_SECONDS} s") from None
    if "No module named pip_audit" in done.stderr:
        raise SkippedError("pip-audit is not installed; python -m pip install pip-audit")
    try:
        return json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SkippedError(f"pip-audit failed: {last[:200]}") from None


def findings(report: Any) -> tuple[list[str], int]:
    """Return a line for each vulnerability, and the number of packages that were compared.

    Raises:
        SkippedError: the service knows none of the packages, so it was not reached.
    """
    packages = report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        raise SkippedError(f"the service answers for none of the {len(packages)} packages")
    lines = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in "
        f"{', '.join(known['fix_versions']) or 'no version'}"
        for package in audited
        for known in package["vulns"]
    ]
    return lines, len(audited)


if __name__ == "__main__":
    sys.exit(main())
