"""The list of plots, and rendering them with matplotlib."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jepa_dist.report.compare import difference, metric
from jepa_dist.report.draw import (
    INK,
    Draw,
    XAxis,
    draw_cosines,
    draw_difference,
    draw_lines,
    draw_time,
    run_colors,
    short,
)
from jepa_dist.report.runs import COSINES, Run

_RC: Any = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names may contain a $
    "xtick.color": INK,
    "ytick.color": INK,
}
# They only grow with the steps, or are in the table at the top.
_NEVER_SHOWN = ("progress", "tokens", "train_seconds", "goodput/wall_seconds")


@dataclass(frozen=True)
class Plot:
    """One plot.

    Args:
        title: Title.
        keys: Metrics, or patterns of them; omitted if no run has any.
        draw: Draws the runs' metrics on axes.
        note: A few words on how to read it.
    """

    title: str
    keys: Sequence[str]
    draw: Draw
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Plots under one heading, and metrics shown in a table because they never change."""

    title: str
    plots: Sequence[Plot]
    constants: Sequence[str] = ()


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return the plots for which these runs have metrics.

    Each heading has the plots listed in the layout, then one for every other metric that matches
    its patterns.
    """
    recorded = dict.fromkeys(key for run in runs for key in run.series)
    left = [key for key in recorded if key not in _NEVER_SHOWN]
    if any(run.cosines() is not None for run in runs):
        left.append(COSINES)
    layout = [
        (title, [_with_keys(plot, left) for plot in plots], patterns)
        for title, plots, patterns in _layout(runs)
    ]
    shown = {key for _, plots, _ in layout for plot in plots for key in plot.keys}
    left = [key for key in left if key not in shown]
    result = []
    for title, plots, patterns in layout:
        rest = _matching(patterns, left)
        left = [key for key in left if key not in rest]
        constants = [key for key in rest if _is_constant(runs, key)]
        others = [Plot(key, (key,), draw_lines) for key in rest if key not in constants]
        result.append(Group(title, [*(plot for plot in plots if plot.keys), *others], constants))
    return [group for group in result if group.plots or group.constants]


def _layout(runs: Sequence[Run]) -> list[tuple[str, list[Plot], list[str]]]:
    """Return headings with their plots, and patterns of metrics that get a plot of their own."""
    live, averaged = metric(runs), metric(runs, "ema_")
    judged = (live, averaged)
    differences = Plot(f"{live}, difference to {runs[0].label}", (live,), draw_difference)
    is_comparable = any(len(difference(runs[0], run, live)[0]) for run in runs[1:])
    return [
        (
            "Loss",
            [
                Plot("cross-entropy, nats per token", ("loss/ce",), draw_lines),
                Plot(
                    "JEPA loss, relative to states without structure",
                    ("jepa/relative",),
                    partial(draw_lines, reference=1.0),
                    "1 is a loss of 1.707",
                ),
            ],
            ["loss/*"],
        ),
        (
            "Validation",
            [
                Plot(f"{live} over steps", judged, draw_lines),
                *([differences] if is_comparable else []),
                *(
                    Plot(f"{live} over {name}", judged, partial(draw_lines, x=axis))
                    for name, axis in _other_axes(runs)
                ),
            ],
            ["val/*", "eval/*", "baseline/*"],
        ),
        (
            "Speed",
            [
                Plot("tokens per second", ("tokens_per_second",), draw_lines),
                Plot("MFU, share of the devices' peak", ("mfu",), draw_lines),
                Plot("seconds per step", ("time/step",), draw_lines, "without evaluation"),
                Plot("seconds per step, by phase", ("time/*",), draw_time),
            ],
            ["throughput/*"],
        ),
        ("Memory", [], ["memory/*"]),
        (
            "Optimization",
            [
                Plot("gradient norm", ("grad_norm",), partial(draw_lines, log=True)),
                Plot("learning rates", ("lr/*",), draw_lines),
            ],
            ["optim/*", "grad*", "update*", "*clip*", "bad_steps"],
        ),
        (
            "JEPA",
            [
                Plot(
                    "gradient of lambda * JEPA against that of cross-entropy, ratio of norms",
                    ("jepa/grad_ratio",),
                    partial(draw_lines, log=True),
                    "0: the objective does nothing",
                ),
                Plot(
                    "cosine of these gradients",
                    ("jepa/grad_cos",),
                    partial(draw_lines, reference=0.0),
                    "below 0: they conflict",
                ),
                Plot(
                    "rank of the tapped states",
                    ("jepa/effective_rank", "jepa/participation_ratio"),
                    draw_lines,
                    "falling to 1: collapse",
                ),
                Plot("mean cos by span length, last measured", (COSINES,), draw_cosines),
                Plot(
                    "loss of spans inside a document, and across documents",
                    ("jepa/within_doc", "jepa/cross_doc"),
                    draw_lines,
                ),
            ],
            ["jepa/*"],
        ),
        ("Checkpoints and goodput", [], ["checkpoint/*", "goodput*"]),
        ("Start-up", [], ["startup/*"]),
        ("Other", [], ["*"]),
    ]


def _other_axes(runs: Sequence[Run]) -> list[tuple[str, XAxis]]:
    """Return the axes, besides steps, over which validation can be plotted."""
    axes: list[tuple[str, XAxis]] = []
    if any(run.tokens_per_step is not None for run in runs):
        axes.append(("tokens", "tokens"))
    if any("train_seconds" in run.series for run in runs):
        axes.append(("training time", "time"))
    return axes


def _with_keys(plot: Plot, present: Sequence[str]) -> Plot:
    return replace(plot, keys=_matching(plot.keys, present))


def _matching(patterns: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [key for pattern in patterns for key in keys if fnmatchcase(key, pattern)]


def _is_constant(runs: Sequence[Run], key: str) -> bool:
    """Return whether the metric is constant within each run (it may differ between runs)."""
    values = [run.series[key].values for run in runs if key in run.series]
    return all(np.array_equal(v, np.full_like(v, v[0]), equal_nan=True) for v in values)


def svg(plot: Plot, runs: Sequence[Run]) -> str:
    """Return a plot as an ``<svg>`` element; its text is text and has the page's text color."""
    # The salt makes ids reproducible, and unique among the plots of a page.
    with mpl.rc_context({**_RC, "svg.hashsalt": plot.title}):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        plot.draw(figure.subplots(), runs, plot.keys)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    element = file.getvalue()
    element = element[element.index("<svg") :]
    # Within HTML, an <svg> element needs no namespace declarations.
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element, count=2)
    element = re.sub(r' id="[^"]*_[0-9]+"', "", element)  # nothing refers to these
    return element.replace(INK, "currentColor")


def overview_png(runs: Sequence[Run], columns: int = 4) -> bytes:
    """Return all plots in one PNG."""
    plots = [plot for group in groups(runs) for plot in group.plots]
    rows = -(-len(plots) // columns)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(4 * columns, 2.6 * rows + 0.5), layout="constrained", dpi=100)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for ax, plot in itertools.zip_longest(axes, plots):
            if plot is None:
                ax.set_axis_off()
            else:
                ax.set_title(short(plot.title, 60))
                plot.draw(ax, runs, plot.keys)
        handles = [Line2D([], [], color=color) for color in run_colors(len(runs))]
        names = [short(run.label, 60) for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=columns)
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
