"""The page: one self-contained HTML file without scripts or network access."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jepa_dist.report.compare import Rows, config_differences, pairing, summary
from jepa_dist.report.draw import run_colors
from jepa_dist.report.plots import Group, Plot, groups, svg
from jepa_dist.report.runs import Run

# The content security policy forbids loading and scripts, whatever a run's name contains.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ddd; --warn: #a33000; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e2e2e2; --paper: #161616; --line: #3a3a3a; --warn: #ffb08a; }}
}}
body {{ margin: 0 auto; max-width: 1500px; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 1.8rem 0 .4rem; border-bottom: 1px solid var(--line); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; min-width: 6rem; max-width: 22rem; overflow-wrap: anywhere; }}
th[scope=row] {{ font-weight: normal; opacity: .75; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em; }}
.legend {{ position: sticky; top: 0; padding: .3rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); overflow: hidden; text-overflow: ellipsis; }}
.legend > span {{ margin-right: 1rem; }}
.warning {{ color: var(--warn); }}
.plots {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ overflow-wrap: anywhere; }}
small {{ opacity: .75; }}
svg {{ display: block; width: 100%; height: auto; }}
</style>
</head>
"""


_READING = (
    "<p><small>Noisy lines are drawn smoothed over their raw values. The first tenth of a run may "
    "lie outside a plot's y range. A cross on the axis marks a value that is not finite."
    "</small></p>"
)


def render(runs: Sequence[Run]) -> str:
    """Return the page as text. All text that comes from the runs is escaped."""
    title = " / ".join(run.label for run in runs)
    sections = [
        _table(runs, summary(runs)),
        *([_comparison(runs), _legend(runs)] if len(runs) > 1 else []),
        _READING,
        *(_group(group, runs) for group in groups(runs)),
    ]
    body = "\n".join(sections)
    return (
        f"{_HEAD.format(title=escape(title))}<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def _comparison(runs: Sequence[Run]) -> str:
    """Return whether the runs are paired, and the differences in their configurations."""
    reasons, differences = pairing(runs), config_differences(runs)
    if reasons:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
        verdict = (
            '<div class="warning"><p>Not paired: a difference may be caused by more than the '
            f"setting under test.</p><ul>{items}</ul></div>"
        )
    else:
        verdict = (
            "<p>Paired: the same seed, data and number of steps. A single pair does not show the "
            "noise between seeds; train more seeds.</p>"
        )
    table = _table(runs, differences) if differences else "<p>The configurations are the same.</p>"
    return f"<h2>What differs</h2>\n{verdict}\n{table}"


def _legend(runs: Sequence[Run]) -> str:
    """Return the runs' colors and names; stays visible while scrolling."""
    names = " ".join(f"<span>{name}</span>" for name in _names(runs))
    return f'<div class="legend">{names}</div>'


def _group(group: Group, runs: Sequence[Run]) -> str:
    figures = "\n".join(_figure(plot, runs) for plot in group.plots)
    plots = f'<div class="plots">\n{figures}\n</div>' if figures else ""
    rows: Rows = [(key, [_constant(run, key) for run in runs]) for key in group.constants]
    constants = f"<p>Constant or recorded once:</p>\n{_table(runs, rows)}" if rows else ""
    return f"<section>\n<h2>{escape(group.title)}</h2>\n{plots}\n{constants}\n</section>"


def _figure(plot: Plot, runs: Sequence[Run]) -> str:
    note = f" <small>{escape(plot.note)}</small>" if plot.note else ""
    caption = f"<figcaption>{escape(plot.title)}{note}</figcaption>"
    return f"<figure>\n{caption}\n{svg(plot, runs)}</figure>"


def _table(runs: Sequence[Run], rows: Rows) -> str:
    """Return a table with one column per run."""
    head = "".join(f'<th scope="col">{name}</th>' for name in _names(runs))
    lines = "\n".join(_row(name, cells) for name, cells in rows)
    return f'<div class="wide"><table>\n<tr><th></th>{head}</tr>\n{lines}\n</table></div>'


def _names(runs: Sequence[Run]) -> list[str]:
    """Return each run's name, preceded by its color."""
    return [
        f'<span class="swatch" style="background:{color}"></span>{escape(run.label)}'
        for color, run in zip(run_colors(len(runs)), runs, strict=True)
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{columns}</tr>'


def _constant(run: Run, key: str) -> str:
    return f"{run.series[key].values[0]:.6g}" if key in run.series else "-"
