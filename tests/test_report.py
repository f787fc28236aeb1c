"""``python -m jepa_dist.report`` on real runs, on damaged ones, and on hostile ones."""

from __future__ import annotations

import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from jepa_dist.report.__main__ import main
from jepa_dist.report.draw import run_colors, thinned
from jepa_dist.report.runs import read_runs
from tests.support.commands import run_command
from tests.support.forked import run_module
from tests.support.tiny import tiny_overrides, write_corpus

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "br", "img", "link"}
RECORD = {"loss/ce": 2.0, "val/bpb": 3.0, "train_seconds": 1.0, "tokens_digest": "aa"}
CONFIG = """\
seed: 1
train: {steps: 4}
batch: {sequences: 8}
model: {seq_len: 16}
jepa: {lambda: 0.0}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of the same seed: ``on`` with the objective, ``off``."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    (folder / "config.yaml").touch()
    for name, weight in (("on", 0.1), ("off", 0.0)):
        settings = tiny_overrides(
            folder, run__dir=folder / name, eval__every=5, jepa__lambda=weight, optim__ema_decay=0.9
        )
        done = run_module("jepa_dist.train", folder / "config.yaml", *settings, timeout=280)
        assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def compared(trained: Path) -> Path:
    """The page that compares these runs."""
    page = trained / "deep" / "both.html"
    report(trained / "off", trained / "on", "--out", page)
    return page


def write_run(folder: Path, records: list[dict[str, Any]], config: str = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "data.json").write_text('{"train": {"digest": "1"}, "val": {"digest": "2"}}')
    (folder / "status.json").write_text('{"state": "running", "step": 0, "reason": ""}')
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def steps(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"step": step, **RECORD, **changes} for step in range(1, count + 1)]


class Page(HTMLParser):
    """Parser of a page; fails on elements that are not closed correctly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def cells(self, row: str) -> list[str]:
        """Return the cells of the row of a table."""
        lines = self.text.split("\n")
        found = lines.index(row) + 1
        return [line for line in lines[found : lines.index("", found)] if line]


def report(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as exit_:
        report(*arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_the_report_of_a_real_run_is_a_page_and_an_image(trained: Path, tmp_path: Path) -> None:
    report(trained / "on", "--out", tmp_path)
    page, final = Page(tmp_path / "report.html"), metrics(trained / "on")[-1]
    assert page.cells("state")[0].startswith("finished")
    assert page.cells("steps") == ["12 of 12"]
    assert page.cells("val/bpb") == [f"{final['val/bpb']:.4f} at step 12"]
    assert page.cells("val/ema_bpb") == [f"{final['val/ema_bpb']:.4f} at step 12"]
    assert page.tags.count("svg") == page.tags.count("figure") >= 12
    for title in (
        "cross-entropy, nats per token",
        "tokens per second",
        "seconds per step, by phase",
    ):
        assert title in page.text
    height, width, _ = matplotlib.image.imread(tmp_path / "report.png").shape
    assert (width, height > 1000) == (1600, True)


@pytest.mark.slow
def test_a_page_is_self_contained(compared: Path) -> None:
    page = Page(compared)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert not {"script", "img", "image", "link", "iframe", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert all(link.startswith("#") for link in links)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert ("name", "viewport") in page.attributes


@pytest.mark.slow
def test_two_real_runs_are_compared(trained: Path, compared: Path) -> None:
    page = Page(compared)
    off, on = (metrics(trained / name)[-1]["val/bpb"] for name in ("off", "on"))
    assert page.cells("val/bpb, difference to off") == ["-", f"{on - off:+.4f} at step 12"]
    assert "Paired: the same seed" in page.text
    assert page.cells("jepa.lambda") == ["0.0", "0.1"]
    assert "run.dir" not in page.text
    assert "val/bpb, difference to off" in page.text
    assert page.tags.count("svg") == page.tags.count("figure")
    assert compared.with_suffix(".png").exists()


@pytest.mark.slow
def test_the_series_are_the_records(trained: Path) -> None:
    (run,) = read_runs([trained / "on"])
    *records, final = metrics(trained / "on")
    assert final["final"] is True
    for key in ("loss/ce", "val/bpb", "grad_norm"):
        expected = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        series = run.series[key]
        assert list(zip(series.steps, series.values, strict=True)) == expected
    assert run.tokens_at(np.array([10.0])) == [10 * 6 * 24]
    assert run.seconds_at(np.array([7.0])) == [records[6]["train_seconds"]]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_shows_the_plots(compared: Path, tmp_path: Path) -> None:
    picture = tmp_path / "screen.png"
    shown = run_command(
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,2400",
        f"--screenshot={picture}",
        "--dump-dom",
        compared.as_uri(),
        timeout=200,
    )
    assert shown.code == 0, shown.output
    figures = Page(compared).tags.count("figure")
    assert shown.output.count("<figure>") == shown.output.count("<svg") == figures
    if picture.exists():
        pixels = matplotlib.image.imread(picture)[..., :3]
        for color in run_colors(2):
            assert (np.abs(pixels - matplotlib.colors.to_rgb(color)).max(-1) < 0.02).sum() > 500


# ---------------------------------------------------------------------------- what may be compared


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIG.replace("seed: 1", "seed: 2"), "b: seed 2 against 1"),
        (CONFIG.replace("steps: 4", "steps: 8"), "b: train.steps 8 against 4"),
        (CONFIG.replace("seq_len: 16", "seq_len: 32"), "b: tokens per step 256 against 128"),
    ],
)
def test_runs_of_other_settings_are_not_paired(tmp_path: Path, config: str, reason: str) -> None:
    runs = [write_run(tmp_path / "a", steps(4)), write_run(tmp_path / "b", steps(4), config)]
    report(*runs, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert "Not paired" in page.text
    assert page.tags.count("li") == 1
    assert reason in page.text


def test_runs_on_other_data_are_neither_paired_nor_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps(4)) for name in "ab"]
    report(*runs, "--out", tmp_path)
    assert "Paired" in Page(tmp_path / "report.html").text
    (tmp_path / "b" / "data.json").write_text('{"train": {"digest": "1"}, "val": {"digest": "9"}}')
    report(*runs, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert "b: validation data 9:0 against 2:0" in page.text
    assert "difference to" not in page.text


def test_a_shorter_run_is_compared_at_the_last_common_step(tmp_path: Path) -> None:
    short = [
        {**record, "val/bpb": 2.5, "tokens_digest": "bb" if record["step"] == 3 else "aa"}
        for record in steps(3)
    ]
    runs = [write_run(tmp_path / "a", steps(4)), write_run(tmp_path / "b", short)]
    report(*runs, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.cells("val/bpb, difference to a") == ["-", "-0.5000 at step 3"]
    assert "b: last recorded step 3 against 4" in page.text
    assert "b: trained on different tokens (tokens_digest at step 3)" in page.text


# ---------------------------------------------------------------------------- what is shown


def test_only_what_was_recorded_is_plotted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [{"step": step, "new/thing": step**2} for step in (1, 2, 3)])
    report(run, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.tags.count("figure") == 1
    assert "Other" in page.text
    assert "new/thing" in page.text


def test_constant_metrics_are_rows_of_a_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps(4, **{"compile/graphs": ord(name)})) for name in "ab"]
    report(*runs, "--out", tmp_path)
    assert Page(tmp_path / "report.html").cells("compile/graphs") == ["97", "98"]


def test_the_cosine_table_is_plotted_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    table = {"lengths": [1, 4], "cos": [[0.0, 0.5], [1.0, 0.5]]}
    run = write_run(tmp_path / "a", steps(2, **{"jepa/cos_table": table}))
    lengths, cosines = read_runs([run])[0].cosines()
    assert (lengths.tolist(), cosines.tolist()) == ([1, 4], [0.25, 0.75])
    report(run, "--out", tmp_path)
    assert "mean cos by span length" in Page(tmp_path / "report.html").text
    bad = write_run(tmp_path / "b", steps(2, **{"jepa/cos_table": {"lengths": [1], "cos": "x"}}))
    report(bad, "--out", tmp_path)
    assert "mean cos by span length" not in Page(tmp_path / "report.html").text


def test_the_page_of_a_long_run_is_bounded(tmp_path: Path) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).normal(size=20_000)
    records = [
        {"step": step + 1, "loss/ce": value, "grad_norm": abs(value)}
        for step, value in enumerate(noise.tolist())
    ]
    report(write_run(tmp_path / "a", records), "--out", tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_thinning_keeps_peaks_and_gaps() -> None:
    x, y = np.arange(50_000.0), np.zeros(50_000)
    y[[12_345, 40_000]], y[30_000] = (7.0, -3.0), math.nan
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) < 1000
    assert (np.diff(kept_x) > 0).all()
    assert np.isnan(kept_y).sum() == 1
    assert set(kept_y[~np.isnan(kept_y)]) == {7.0, -3.0, 0.0}


def test_colors_distinguish_runs() -> None:
    for count in (1, 2, 6, 7, 20):
        assert len(set(run_colors(count))) == count


# ---------------------------------------------------------------------------- damaged and hostile


def test_damaged_lines_are_counted_reported_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", steps(3))
    whole = (run / "metrics.jsonl").read_text()
    damage = b'\xff\xfe nothing\n[1, 2]\n{"loss/ce": 1.0}\n'
    (run / "metrics.jsonl").write_bytes(damage + whole.encode() + b'{"step": 4, "loss')
    report(run)
    note = "4 damaged line(s) skipped, the first is line 1"
    assert note in capsys.readouterr().out
    page = Page(run / "report.html")
    assert note in page.text
    assert page.cells("steps") == ["3 of 4"]


def test_values_that_are_not_finite_are_shown_as_such(tmp_path: Path) -> None:
    values = [2.0, math.nan, math.inf, None, 1.0, -math.inf]
    records = [
        {"step": step, "loss/ce": value, "grad_norm": math.nan, "val/bpb": value}
        for step, value in enumerate(values, 1)
    ]
    run = write_run(tmp_path / "a", records)
    report(run, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.cells("not finite") == [
        "loss/ce from step 2, grad_norm from step 1, val/bpb from step 2"
    ]
    assert page.cells("best val/bpb") == ["1.0000 at step 5"]


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "status.json"])
@pytest.mark.parametrize("damage", [b"", b"[", b"\xff\xfe", b"- 1\n"])
def test_other_files_may_be_damaged(tmp_path: Path, name: str, damage: bytes) -> None:
    run = write_run(tmp_path / "a", steps(3))
    (run / name).write_bytes(damage)
    assert read_runs([run])[0].notes == (f"{name}: damaged, not used",)


def test_other_files_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, steps(3)) for name in "ab"]
    for name in ("config.yaml", "data.json", "status.json"):
        (runs[1] / name).unlink()
    report(*runs, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert "b: status.json: missing" in capsys.readouterr().out
    assert "b: seed not known" in page.text
    assert page.cells("state") == ["running", "unknown"]


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)",
        "<img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "a]]>--><b>",
        "$\\frac{$",
        "line\nbreak\udcff",
        "x" * 200,
    ],
)
def test_hostile_names_are_escaped(tmp_path: Path, name: str) -> None:
    key = "evil/</text><script>alert(2)</script>"
    runs = [
        write_run(tmp_path / name, [{"step": n, key: n, f"time/{name}": n} for n in (1, 2)]),
        write_run(tmp_path / "plain", [{"step": n, key: n, f"time/{name}": 1} for n in (1, 2)]),
    ]
    (runs[0] / "status.json").write_text(json.dumps({"state": name, "reason": "\ud800<script>"}))
    report(*runs, "--out", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.tags.count("svg") == page.tags.count("figure") == 2
    assert not [value for name, value in page.attributes if name.startswith("on")]
    shown = "".join(char if char.isprintable() else "?" for char in name)
    assert page.text.count(shown) > 1
    assert key in page.text


# ---------------------------------------------------------------------------- user errors


def test_user_errors_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", steps(1))
    empty = write_run(tmp_path / "empty", [])
    (tmp_path / "other").mkdir()
    begun = write_run(tmp_path / "begun", [])
    (begun / "metrics.jsonl").unlink()
    assert "none: no such run directory" in failure(capsys, tmp_path / "none")
    assert "other: not a run directory" in failure(capsys, tmp_path / "other")
    assert "no step is recorded yet; wait" in failure(capsys, empty)
    assert "no step is recorded yet; wait" in failure(capsys, begun)
    assert "a: given twice" in failure(capsys, run, tmp_path / "other" / ".." / "a")
    out = run / "metrics.jsonl" / "page.html"
    assert "name another path with --out" in failure(capsys, run, "--out", out)


def test_without_matplotlib_it_names_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "a", steps(1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "extra [report]" in failure(capsys, run)


def test_path_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / name, steps(2)) for name in "ab"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report(runs[0])
    assert (runs[0] / "report.html").exists()
    assert (runs[0] / "report.png").exists()
    report(*runs)
    assert sorted(path.name for path in Path().iterdir()) == ["report.html", "report.png"]
    assert "written: report.html and report.png" in capsys.readouterr().out


def test_runs_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    runs = [write_run(tmp_path / parent / "run", steps(2)) for parent in ("one", "two")]
    assert [run.label for run in read_runs(runs)] == [str(run) for run in runs]
