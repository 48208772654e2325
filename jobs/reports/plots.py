"""Plots of statistics, drawn with matplotlib: for `basic stats --plot` and for reports.

Needs the extra `plot`. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.reports.chart_data import (
    ACCEPTANCE,
    MINUTE_S,
    RELIABILITY,
    THROUGHPUT,
    TREE_SIZES,
    Chart,
    Dot,
    acceptance_shares,
    dots,
    throughput,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Statistics = Mapping[str, Any]  # what `/v1/stats` returns

DRAFT, TARGET = "#2a9d63", "#8e5bd0"  # accepted draft tokens; tokens of the target itself
_GREY: Final = "#808890"  # readable on white and on black
_PNG_DPI: Final = 150
_MAX_POINTS: Final = 3_000


def save_png(statistics: Statistics, title: str, path: Path) -> None:
    """Write all plots into one picture."""
    figure = _figure(10.5, 7.6)
    for position, draw in enumerate(PLOTS.values(), start=1):
        draw(figure.add_subplot(2, 2, position), statistics)
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.savefig(path, format="png", dpi=_PNG_DPI, facecolor="white")


def svg(statistics: Statistics, name: str) -> str:
    """Return one plot as an SVG element for a page with any background."""
    import matplotlib

    ink = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name} | dict.fromkeys(ink, _GREY)
    with matplotlib.rc_context(style):
        figure = _figure(5.2, 3.4)
        PLOTS[name](figure.add_subplot(), statistics)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_name)
    axes.set_ylabel(chart.y_name)


def _acceptance(axes: Axes, statistics: Statistics) -> None:
    _label(axes, ACCEPTANCE)
    shares = acceptance_shares(statistics)
    if not shares:
        return _nothing(axes)
    counts = [count for count, _ in shares]
    bars = axes.bar(counts, [share for _, share in shares], color=DRAFT)
    axes.bar_label(bars, fmt=lambda share: f"{share:.0%}" if share >= 0.005 else "", fontsize=8, padding=1)
    last = max(3, *counts)  # a single bar would fill the picture
    axes.set_xticks(range(last + 1))
    axes.set_xlim(-0.6, last + 0.6)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(y=0.12)


def _throughput(axes: Axes, statistics: Statistics) -> None:
    _label(axes, THROUGHPUT)
    found = throughput(statistics, _MAX_POINTS)
    if not found.rates:
        return _nothing(axes)
    minutes = [index * found.interval_s / MINUTE_S for index in range(len(found.rates) + 1)]
    heights = [rate for _, rate in found.rates]
    axes.step(minutes, [*heights, heights[-1]], where="post", color=TARGET)
    axes.set_ylim(0, 1.1 * max(heights) or 1)
    axes.locator_params(axis="x", integer=True)


def _tree_sizes(axes: Axes, statistics: Statistics) -> None:
    _label(axes, TREE_SIZES)
    found = dots(TREE_SIZES, statistics)
    if not found:
        return _nothing(axes)
    axes.plot([dot.x for dot in found], [dot.y for dot in found], color=DRAFT, linewidth=1, alpha=0.5)
    _scatter(axes, found, DRAFT)
    axes.set_ylim(bottom=0)
    max_batch = max(dot.x for dot in found)
    if max_batch > 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, max_batch + 1)
        axes.locator_params(axis="x", integer=True)


def _reliability(axes: Axes, statistics: Statistics) -> None:
    _label(axes, RELIABILITY)
    found = dots(RELIABILITY, statistics)
    if not found:
        return _nothing(axes)
    end = max(0.5, *(max(dot.x, dot.y) for dot in found))
    axes.plot([0, end], [0, end], color=_GREY, linestyle="--", linewidth=1, label="as expected")
    _scatter(axes, found, TARGET)
    axes.legend(frameon=False, fontsize=8)


def _scatter(axes: Axes, found: Sequence[Dot], color: str) -> None:
    sizes = [12 + 120 * dot.weight for dot in found]
    axes.scatter([dot.x for dot in found], [dot.y for dot in found], s=sizes, color=color, alpha=0.8)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes, color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])


PLOTS: Final[Mapping[str, Callable[[Axes, Statistics], None]]] = {
    "acceptance": _acceptance,
    "throughput": _throughput,
    "trees": _tree_sizes,
    "reliability": _reliability,
}
