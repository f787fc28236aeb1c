"""Draw metrics on axes.

A run has the same color in all plots. Several metrics in one plot differ in line style, or in color
if there is only one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter, NullFormatter

from jepa_dist.report.compare import difference
from jepa_dist.report.runs import Array, Run

# Text and axes; in the page this color is replaced by the page's text color, light or dark.
INK = "#010203"
# Okabe and Ito, "Color Universal Design" (2008), without black and yellow.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)))
_LOG_SPAN = 30.0  # largest over smallest value from which a logarithmic scale is used
_MOST_POINTS = 600  # per line; more only make the page larger

XAxis = Literal["step", "tokens", "time"]
Draw = Callable[[Axes, Sequence[Run], Sequence[str]], None]


def run_colors(count: int) -> list[str]:
    """Return a color for each run, distinguishable by color-blind readers up to six runs."""
    return list(_PALETTE[:count]) if count <= len(_PALETTE) else _spread(count)


def draw_lines(
    ax: Axes,
    runs: Sequence[Run],
    keys: Sequence[str],
    x: XAxis = "step",
    log: bool = False,
    reference: float | None = None,
) -> None:
    """Draw each metric of each run; noisy ones smoothed, over their raw values."""
    label, place = _x_axis(runs, x)
    by_key = len(runs) == 1 and len(keys) > 1
    colors = run_colors(len(keys) if by_key else len(runs))
    for (number, key), (index, run) in itertools.product(enumerate(keys), enumerate(runs)):
        color = colors[number if by_key else index]
        style = "-" if by_key else _STYLES[number % len(_STYLES)]
        if key in run.series:
            series = run.series[key]
            along = place(run, series.steps)
            if along is not None:
                _draw_line(ax, along, series.values, color, style)
        if index == 0 and len(keys) > 1:
            legend_color = color if by_key else INK
            ax.plot([], [], color=legend_color, linestyle=style, label=short(key, 30))
    if reference is not None:
        ax.axhline(reference, color=INK, linewidth=0.8, linestyle=":")
    _finish(ax, label, log)


def draw_difference(ax: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Draw the difference of each other run to the first one."""
    for color, run in list(zip(run_colors(len(runs)), runs, strict=True))[1:]:
        steps, gaps = difference(runs[0], run, keys[0])
        _draw_line(ax, steps, gaps, color, "-")
    ax.axhline(0.0, color=INK, linewidth=0.8, linestyle=":")
    _finish(ax, "step")


def draw_time(ax: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Draw a step's time by phase: over the steps of one run, or the mean of each of several."""
    parts = [key for key in keys if key != "time/step"] or list(keys)
    names = [short(key.removeprefix("time/"), 30) for key in parts]
    if len(runs) == 1:
        steps = np.array([record["step"] for record in runs[0].records], np.float64)
        times = [_at_each(runs[0], key, steps) for key in parts]
        ax.stackplot(steps, times, colors=_spread(len(parts)), labels=names)
        ax.set_ylabel("seconds per step")
        _finish(ax, "step")
    else:
        _draw_bars(ax, runs, parts, names)
    ax.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def _draw_bars(ax: Axes, runs: Sequence[Run], parts: Sequence[str], names: Sequence[str]) -> None:
    """Draw one bar per run, without the first record, whose steps include compilation."""
    starts = np.zeros(len(runs))
    for part, name, color in zip(parts, names, _spread(len(parts)), strict=True):
        means = [_mean_per_record(run, part) for run in runs]
        ax.barh(range(len(runs)), means, left=starts, color=color, label=name)
        starts += means
    ax.set_yticks(range(len(runs)), [short(run.label, 16) for run in runs])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("seconds per step, mean")


def _mean_per_record(run: Run, key: str) -> float:
    steps = np.array([record["step"] for record in run.records], np.float64)
    return float(_at_each(run, key, steps[1:] if len(steps) > 1 else steps).mean())


def _at_each(run: Run, key: str, steps: Array) -> Array:
    """Return the metric at these steps; 0 where it was not recorded or is not finite."""
    if key not in run.series:
        return np.zeros_like(steps)
    series = run.series[key]
    known = dict(zip(series.steps, series.values, strict=True))
    return np.nan_to_num([known.get(step, 0.0) for step in steps], posinf=0.0, neginf=0.0)


def draw_cosines(ax: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Draw the last ``jepa/cos_table`` of each run, by span length."""
    for color, run in zip(run_colors(len(runs)), runs, strict=True):
        cosines = run.cosines()
        if cosines is not None:
            ax.plot(*cosines, color=color, marker=".")
    ax.set_xlabel("span length")


def _draw_line(ax: Axes, x: Array, y: Array, color: str, style: Any) -> None:
    """Draw a line; NaN and infinities become gaps in it and crosses on the axis."""
    finite = np.isfinite(y)
    y = np.where(finite, y, np.nan)
    smooth = _smoothed(y)
    marker = "o" if len(y) == 1 else "." if len(y) <= 40 else None
    if _is_noisy(y, smooth):
        ax.plot(*thinned(x, y), color=color, alpha=0.3, linewidth=0.7)
        y, marker = smooth, None
    fill = color if style == "-" else "none"
    ax.plot(
        *thinned(x, y),
        color=color,
        linestyle=style,
        marker=marker,
        markersize=4,
        markerfacecolor=fill,
    )
    if not finite.all():
        bad, bottom = x[~finite], np.full((~finite).sum(), 0.03)
        ax.plot(bad, bottom, "x", color=color, transform=ax.get_xaxis_transform())


def _smoothed(y: Array) -> Array:
    """Return the mean over a centered window of about a twentieth of the line, ignoring NaN."""
    window = np.ones(2 * (len(y) // 40) + 1)
    known = np.isfinite(y)
    sums = np.convolve(np.where(known, y, 0.0), window, mode="same")
    return np.where(known, sums / np.maximum(np.convolve(known, window, mode="same"), 1), np.nan)


def _is_noisy(y: Array, smooth: Array) -> bool:
    """Return whether the median distance to the smoothed line exceeds 1 % of that line's range."""
    known = np.isfinite(y)
    if known.sum() < 60:
        return False
    return bool(np.median(np.abs(y - smooth)[known]) > 0.01 * np.ptp(smooth[known]))


def thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """Reduce a line to about ``_MOST_POINTS`` points: minimum and maximum of each interval, so that
    peaks are kept, and one gap (NaN) of each interval that has one."""
    if len(y) <= _MOST_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(y)), _MOST_POINTS // 3):
        values = y[stretch]
        gaps = stretch[np.isnan(values)][:1]
        low_high = [] if np.isnan(values).all() else [np.nanargmin(values), np.nanargmax(values)]
        kept += sorted({*gaps, *(stretch[at] for at in low_high)})
    return x[kept], y[kept]


def _x_axis(runs: Sequence[Run], x: XAxis) -> tuple[str, Callable[[Run, Array], Array | None]]:
    """Return the axis label, and a function from a run's steps to x values (None if unknown)."""
    if x == "step":
        return "step", lambda run, steps: steps
    if x == "tokens":
        return "tokens", Run.tokens_at
    times = [run.series["train_seconds"] for run in runs if "train_seconds" in run.series]
    longest = max((series.values[-1] for series in times), default=0.0)
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, length = next((unit for unit in units if longest >= 2 * unit[1]), units[-1])

    def place(run: Run, steps: Array) -> Array | None:
        seconds = run.seconds_at(steps)
        return None if seconds is None else seconds / length

    return unit, place


def _finish(ax: Axes, label: str, log: bool = False) -> None:
    """Set scales, tick labels and legend."""
    values = _points(ax)[1]
    if log and len(values) and 0 < _LOG_SPAN * values.min() < values.max():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        _cut_start(ax)
        ax.ticklabel_format(axis="y", useOffset=False)
        if max(map(abs, ax.get_ylim())) >= 1e4:
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(label)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")


def _cut_start(ax: Axes) -> None:
    """Fit the y range to the last nine tenths if the first tenth would dominate it."""
    x, y = _points(ax)
    if not len(x):
        return
    late = y[x > 0.1 * x.max()]
    if len(late) and 0 < 3 * np.ptp(late) < np.ptp(y):
        margin = 0.1 * np.ptp(late)
        ax.set_ylim(late.min() - margin, late.max() + margin)


def _points(ax: Axes) -> tuple[Array, Array]:
    """Return all finite points of lines in data coordinates."""
    lines = [line.get_xydata() for line in ax.lines if line.get_transform() == ax.transData]
    points = np.concatenate([np.empty((0, 2)), *(np.asarray(line, float) for line in lines)])
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]


def _spread(count: int) -> list[str]:
    """Return colors in even steps of a perceptually uniform colormap."""
    return [to_hex(color) for color in mpl.colormaps["viridis"](np.linspace(0.05, 0.95, count))]


def short(text: str, length: int) -> str:
    """Shorten a name to ``length`` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."
