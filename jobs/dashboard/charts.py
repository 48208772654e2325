"""Build charts of statistics as ECharts options, which the browser draws.

One function per chart. Colours come from `layout` and suit light and dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.dashboard import html
from jobs.dashboard.layout import DRAFT, GREY, TARGET
from jobs.reports import chart_data
from storage.job_details import TreeDetails
from storage.statistics import JobStats

Option = dict[str, Any]

_MAX_POINTS = 300


def throughput(stats: JobStats) -> Option:
    """Return tokens per second over time."""
    return _chart(
        xAxis=_axis("time", "") | {"axisLabel": {"color": GREY, "hideOverlap": True}},
        yAxis=_vertical_axis(chart_data.THROUGHPUT.y_name),
        series=[
            {
                "type": "line",
                "step": "end",
                "data": _points(stats),
                "color": TARGET,
                "symbol": "none",
                "areaStyle": {"opacity": 0.15},
            }
        ],
    )


def acceptance(stats: JobStats) -> Option:
    """Return the shares of steps by their accepted draft tokens."""
    shares = chart_data.acceptance_shares(stats)
    return _chart(
        xAxis=_axis("category", chart_data.ACCEPTANCE.x_name) | {"data": [str(accepted) for accepted, _ in shares]},
        yAxis=_vertical_axis("% of steps"),
        series=[_bars([round(100 * share, 2) for _, share in shares], DRAFT)],
    )


def depths(stats: JobStats) -> Option:
    """Return the acceptance rate of draft tokens by depth in the tree."""
    return _rate_bars("depth in the tree", [(row.depth, row.rate) for row in stats.acceptance_by_depth])


def ranks(stats: JobStats) -> Option:
    """Return the acceptance rate of draft tokens by their rank among the children of a node."""
    return _rate_bars("rank of the child", [(row.child_rank + 1, row.rate) for row in stats.acceptance_by_rank])


def _rate_bars(name: str, rates: list[tuple[int, float]]) -> Option:
    return _chart(
        xAxis=_axis("category", name) | {"data": [str(label) for label, _ in rates]},
        yAxis=_vertical_axis("% accepted") | {"max": 100},
        series=[_bars([round(100 * rate, 1) for _, rate in rates], DRAFT)],
    )


def trees(stats: JobStats) -> Option:
    """Return the mean tree size at each batch size; larger dots for more steps."""
    return _chart(
        xAxis=_axis("value", chart_data.TREE_SIZES.x_name) | {"minInterval": 1, "min": 0},
        yAxis=_vertical_axis(chart_data.TREE_SIZES.y_name),
        series=[
            {
                "type": "line",
                "data": _dots(chart_data.TREE_SIZES, stats),
                "color": DRAFT,
                "symbol": "circle",
                "lineStyle": {"width": 1, "opacity": 0.5},
            }
        ],
    )


def reliability(stats: JobStats) -> Option:
    """Return accepted against expected draft tokens; on the diagonal the expectation is right."""
    points = _dots(chart_data.RELIABILITY, stats)
    end = max((max(point["value"]) for point in points), default=1)
    diagonal = {"type": "line", "data": [[0, 0], [end, end]], "symbol": "none", "color": GREY, "silent": True}
    return _chart(
        xAxis=_axis("value", chart_data.RELIABILITY.x_name),
        yAxis=_vertical_axis(chart_data.RELIABILITY.y_name),
        series=[
            diagonal | {"lineStyle": {"type": "dashed", "width": 1}},
            {"type": "scatter", "data": points, "color": TARGET},
        ],
    )


def phases(stats: JobStats) -> Option:
    """Return the shares of the step time: draft, verify, host."""
    shares = chart_data.phase_shares(stats.draft_share or 0.0, stats.verify_share or 0.0)
    series = [
        {"type": "bar", "stack": "all", "name": name, "data": [round(100 * share, 1)], "color": color, "barWidth": 34}
        for (name, share), color in zip(shares, (DRAFT, TARGET, GREY), strict=True)
    ]
    return _chart(
        xAxis=_axis("value", "% of step time") | {"max": 100},
        yAxis=_axis("category", "") | {"data": [""]},
        series=series,
    ) | {"legend": {"textStyle": {"color": GREY}, "top": 0}}


def decisions(stats: JobStats) -> Option:
    """Return the share of steps by their decision on drafts."""
    rows = stats.decisions[::-1]
    return _chart(
        xAxis=_axis("value", "% of steps"),
        yAxis=_axis("category", "") | {"data": [row.decision or "unknown" for row in rows]},
        series=[_bars([round(100 * row.share, 1) for row in rows], TARGET)],
    )


def tree(recorded: TreeDetails) -> Option:
    """Return a draft tree: tokens, their probability given the parent, and the accepted path."""
    children: dict[int, list[int]] = {}
    for node, (parent, *_) in enumerate(recorded.nodes):
        children.setdefault(parent, []).append(node)
    return {
        "aria": {"enabled": True},
        "tooltip": {"trigger": "item"},
        "series": [
            {
                "type": "tree",
                "data": [_branch(recorded.nodes, children, 0)],
                "orient": "LR",
                "initialTreeDepth": -1,
                "expandAndCollapse": False,
                "roam": True,
                "left": 60,
                "right": 90,
                "top": 12,
                "bottom": 12,
                "symbol": "circle",
                "symbolSize": 9,
                "edgeForkPosition": "40%",
                "animation": False,
            }
        ],
    }


def tree_height(recorded: TreeDetails) -> int:
    """Return the height of a tree in pixels: one row per leaf."""
    parents = {parent for parent, *_ in recorded.nodes}
    leaves = sum(1 for node in range(len(recorded.nodes)) if node not in parents)
    return max(160, 34 * leaves + 40)


def _points(stats: JobStats) -> list[list[float]]:
    """Return [Unix time in ms, tokens per second]; the last rate again at the end of its interval."""
    found = chart_data.throughput(stats, _MAX_POINTS)
    points = [[start_s * 1_000.0, round(rate, 3)] for start_s, rate in found.rates]
    return [*points, [points[-1][0] + found.interval_s * 1_000, points[-1][1]]] if points else []


def _dots(chart: chart_data.Chart, stats: JobStats) -> list[Option]:
    return [
        {"value": [round(dot.x, 2), round(dot.y, 2)], "symbolSize": 6 + 18 * dot.weight**0.5}
        for dot in chart_data.dots(chart, stats)
    ]


def _branch(nodes: Sequence[Any], children: dict[int, list[int]], node: int) -> Option:
    parent, _, text, value, accepted = nodes[node]
    above = nodes[parent][3] if parent >= 0 else 1.0
    share = value / above if above else 0.0
    color = DRAFT if accepted else GREY
    label = html.token(text) if parent < 0 else f"{html.token(text)} {share:.2f}"
    return {
        "name": label,
        "value": round(value, 3),
        "itemStyle": {"color": TARGET if parent < 0 else color, "borderColor": color},
        "lineStyle": {"color": color, "width": 3 if accepted else 1},
        "label": {
            "position": "left" if parent < 0 else ("top" if node in children else "right"),
            "color": color if accepted else GREY,
            "fontWeight": "bold" if accepted else "normal",
            "fontSize": 12,
            "align": None,
        },
        "children": [_branch(nodes, children, child) for child in children.get(node, ())],
    }


def _chart(**parts: Any) -> Option:
    return {
        "aria": {"enabled": True},
        "grid": {"left": 8, "right": 22, "top": 34, "bottom": 28, "containLabel": True},
        "tooltip": {"trigger": "item", "confine": True},
        "animation": False,  # charts are redrawn every few seconds
        **parts,
    }


def _axis(kind: str, name: str) -> Option:
    ink = {"lineStyle": {"color": GREY}}
    return {
        "type": kind,
        "name": name,
        "nameLocation": "middle",
        "nameGap": 24,
        "nameTextStyle": {"color": GREY},
        "axisLabel": {"color": GREY},
        "axisLine": ink,
        "splitLine": {"lineStyle": {"color": GREY, "opacity": 0.2}},
    }


def _vertical_axis(name: str) -> Option:
    """Return a vertical value axis with its name above it."""
    return _axis("value", name) | {
        "nameLocation": "end",
        "nameGap": 14,
        "nameTextStyle": {"color": GREY, "align": "left", "padding": [0, 0, 0, -24]},
    }


def _bars(values: list[float], color: str) -> Option:
    return {"type": "bar", "data": values, "color": color, "barMaxWidth": 40, "itemStyle": {"borderRadius": 2}}
