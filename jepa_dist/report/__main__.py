"""Show runs on one page: ``python -m jepa_dist.report RUN [RUN ...] [--out DIR_OR_FILE]``.

Writes a self-contained HTML page (no scripts, no network access) and an overview PNG next to it.
The other runs are compared with the first one.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jepa_dist.command_line import program
from jepa_dist.errors import UserError
from jepa_dist.process.failure import exit_on_user_error
from jepa_dist.report.runs import Run, read_runs

_NAME = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report; exit with code 2 on any problem the user can fix."""
    arguments = _parse_arguments(argv)
    with exit_on_user_error(rank=0):
        runs = read_runs(arguments.runs)
        for run in runs:
            for note in run.notes:
                print(f"{run.label}: {note}")
        page = page_path(arguments.out, arguments.runs)
        write_report(runs, page)
        print(f"written: {page} and {page.with_suffix('.png')}")


def page_path(out: Path | None, runs: Sequence[Path]) -> Path:
    """Return the page's path: ``out`` if it ends in .html, else report.html in the folder ``out``,
    by default the run directory of a single run, the current folder for several."""
    if out is None:
        out = runs[0] if len(runs) == 1 else Path()
    return out if out.suffix == ".html" else out / _NAME


def write_report(runs: Sequence[Run], page: Path) -> None:
    """Write the page, and the overview PNG next to it.

    Raises:
        UserError: matplotlib is not installed, or the files cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "report: matplotlib (the extra [report]) is not installed; fix: "
            "python -m pip install 'matplotlib>=3.8' -c constraints.txt"
        )
    from jepa_dist.report.page import render
    from jepa_dist.report.plots import overview_png

    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(runs), encoding="utf-8", errors="replace")
        page.with_suffix(".png").write_bytes(overview_png(runs))
    except OSError as error:
        raise UserError(
            f"{page}: cannot be written: {error.strerror}; name another path with --out"
        ) from None


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("jepa_dist.report"),
        description="Write a self-contained HTML page and a PNG that show and compare runs.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directory; the others are compared with the first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR_OR_FILE",
        help="folder, or page.html; default: report.html in the run directory, or in the current "
        "folder for several runs",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
