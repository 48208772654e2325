"""Plots of a job's statistics, drawn with matplotlib: for `basic stats --plot` and for reports.

Needs the extra `plot`; imports matplotlib when it draws.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.reports.rates import MINUTE_S, rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Mapping[str, Any]  # what `/stats` says

DRAFT, TARGET = "#2a9d63", "#8e5bd0"  # accepted draft tokens; the target's own
_GREY: Final = "#808890"  # readable on white and on black
_PNG_DPI: Final = 150
_MOST_POINTS: Final = 3_000


def save_png(numbers: Numbers, title: str, path: Path) -> None:
    """Write all plots of a job, or of everything, into one picture."""
    figure = _figure(10.5, 7.6)
    for place, draw in enumerate(PLOTS.values(), start=1):
        draw(figure.add_subplot(2, 2, place), numbers)
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.savefig(path, format="png", dpi=_PNG_DPI, facecolor="white")


def svg(numbers: Numbers, name: str) -> str:
    """Return one plot as an SVG element to put into a page, on whatever ground that has."""
    import matplotlib

    ink = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor")
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": name} | dict.fromkeys(ink, _GREY)
    with matplotlib.rc_context(look):
        figure = _figure(5.2, 3.4)
        PLOTS[name](figure.add_subplot(), numbers)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _accepted(axes: Axes, numbers: Numbers) -> None:
    """How many draft tokens steps kept."""
    rows = numbers["acceptance"]
    steps = sum(row["steps"] for row in rows)
    axes.set_title("Draft tokens accepted in a step")
    axes.set_xlabel("accepted draft tokens")
    axes.set_ylabel("share of steps")
    if not steps:
        return _nothing(axes)
    counts = [row["accepted_tokens"] for row in rows]
    bars = axes.bar(counts, [row["steps"] / steps for row in rows], color=DRAFT)
    axes.bar_label(bars, fmt=lambda share: f"{share:.0%}" if share >= 0.005 else "", fontsize=8, padding=1)
    last = max(3, *counts)  # one bar alone would fill the picture
    axes.set_xticks(range(last + 1))
    axes.set_xlim(-0.6, last + 0.6)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(y=0.12)


def _throughput(axes: Axes, numbers: Numbers) -> None:
    """Tokens a second, minute by minute."""
    rows = numbers["minutes"]
    axes.set_title("Tokens per second")
    axes.set_xlabel("minutes")
    if not rows:
        return _nothing(axes)
    together, found = rates([(row["minute"], row["tokens"], row.get("busy_s", MINUTE_S)) for row in rows], _MOST_POINTS)
    minutes = [place * together for place in range(len(found) + 1)]
    heights = [rate for _, rate in found]
    axes.step(minutes, [*heights, heights[-1]], where="post", color=TARGET)
    axes.set_ylim(0, 1.1 * max(heights) or 1)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("tokens/s while at work")


def _trees(axes: Axes, numbers: Numbers) -> None:
    """How large trees were at each batch size; dots are as large as their share of the steps."""
    rows = numbers["batch_sizes"]
    axes.set_title("Tree size at each batch size")
    axes.set_xlabel("sequences in the step")
    axes.set_ylabel("draft nodes per sequence, mean")
    if not rows:
        return _nothing(axes)
    most = max(row["steps"] for row in rows)
    sizes = [12 + 120 * row["steps"] / most for row in rows]
    batch, nodes = [row["batch_sequences"] for row in rows], [row["mean_tree_nodes"] for row in rows]
    axes.plot(batch, nodes, color=DRAFT, linewidth=1, alpha=0.5)
    axes.scatter(batch, nodes, s=sizes, color=DRAFT, alpha=0.8)
    axes.set_ylim(bottom=0)
    if max(batch) > 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, max(batch) + 1)
        axes.locator_params(axis="x", integer=True)


def _reliability(axes: Axes, numbers: Numbers) -> None:
    """Accepted over expected: on the diagonal, drafts are worth what they were taken for."""
    rows = numbers["reliability"]
    axes.set_title("Accepted against expected")
    axes.set_xlabel("expected accepted tokens")
    axes.set_ylabel("accepted tokens, mean")
    if not rows:
        return _nothing(axes)
    most = max(row["steps"] for row in rows)
    expected, accepted = [row["mean_expected"] for row in rows], [row["mean_accepted"] for row in rows]
    end = max(*expected, *accepted, 0.5)
    axes.plot([0, end], [0, end], color=_GREY, linestyle="--", linewidth=1, label="as expected")
    axes.scatter(expected, accepted, s=[12 + 120 * row["steps"] / most for row in rows], color=TARGET, alpha=0.8)
    axes.legend(frameon=False, fontsize=8)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes, color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])


PLOTS: Final[Mapping[str, Callable[[Axes, Numbers], None]]] = {
    "acceptance": _accepted,
    "throughput": _throughput,
    "trees": _trees,
    "reliability": _reliability,
}
