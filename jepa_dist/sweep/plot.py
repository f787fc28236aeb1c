"""Draw a sweep's paired differences, one panel for each metric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jepa_dist.errors import UserError
from jepa_dist.sweep.paired import mean_interval
from jepa_dist.sweep.results import Results
from jepa_dist.sweep.verdicts import Evidence, evidence, metrics_of_loss

_COLUMNS = 3
_PAIR, _MEAN, _MARGIN = "#56B4E9", "#0072B2", "#00000018"


def write_plot(results: Results, path: Path) -> None:
    """Write ``draw_sweep`` to a .png or .svg file.

    Raises:
        UserError: there is no pair yet, or the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a name that ends in .png or .svg")
    figure = draw_sweep(results)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from None


def draw_sweep(results: Results) -> Figure:
    """Return a figure of the arms' differences to the control, a panel for each metric.

    A point is a pair. A bar is the mean with its 95 % interval, of at least two pairs; it is
    unadjusted: the verdicts of ``verdicts.py`` correct for the number of arms. The gray band is the
    margin that the sweep declares.

    Raises:
        UserError: there is no pair yet.
    """
    final, *others = metrics_of_loss(results.metric)
    found = {key: evidence(results, key) for key in (final, *others, *results.evaluated)}
    panels = {metric: arms for metric, arms in found.items() if arms}
    if not panels:
        raise UserError("--plot: no arm has a pair with the control yet; nothing to draw")
    arms = [arm for arm in results.arms if any(arm in one for one in panels.values())]
    rows = -(-len(panels) // _COLUMNS)
    columns = min(_COLUMNS, len(panels))
    size = (4.2 * columns, rows * (1.1 + 0.42 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax, (metric, one) in zip(axes, panels.items(), strict=False):
        _draw_metric(ax, metric, one, arms)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _draw_metric(ax: Axes, metric: str, found: Mapping[str, Evidence], arms: list[str]) -> None:
    margin = next((one.margin for one in found.values()), None)
    if margin is not None:
        ax.axvspan(-margin, margin, color=_MARGIN, lw=0)
    ax.axvline(0, color="black", lw=0.8)
    for place, arm in enumerate(arms):
        if arm in found:
            _draw_arm(ax, place, found[arm])
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_title(f"{metric}, arm - control", fontsize="medium")
    ax.tick_params(labelsize="small")
    ax.set_xlabel(_directions(next(iter(found.values()))), fontsize="small")


def _draw_arm(ax: Axes, place: int, one: Evidence) -> None:
    pairs = len(one.differences)
    ax.plot(one.differences, [place + 0.18] * pairs, "o", color=_PAIR, ms=3.5, alpha=0.7, mew=0)
    interval = mean_interval(one.differences)
    if interval is not None:
        ax.plot(interval, [place - 0.12] * 2, color=_MEAN, lw=2.5, solid_capstyle="butt")
    ax.plot([one.mean], [place - 0.12], "D", color=_MEAN, ms=5)


def _directions(one: Evidence) -> str:
    return f"< 0: {one.if_below}, > 0: {one.if_above}"
