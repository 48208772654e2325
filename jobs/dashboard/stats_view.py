"""Figures, charts and tables of statistics, as a part of a page. Each chart also has its numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from nicegui import ui

from jobs.dashboard import charts, format
from jobs.dashboard.layout import box, heading
from jobs.reports.chart_data import ACCEPTANCE, RELIABILITY, THROUGHPUT, TREE_SIZES
from jobs.reports.speedup import basis_text, check_text
from storage.statistics import JobStats, SpeedupCheckStats

_CHARTS: Final[Sequence[tuple[str, Callable[[JobStats], dict[str, Any]]]]] = (
    (THROUGHPUT.title, charts.throughput),
    (ACCEPTANCE.title, charts.acceptance),
    ("Acceptance by depth", charts.depths),
    ("Acceptance by rank", charts.ranks),
    (TREE_SIZES.title, charts.trees),
    (RELIABILITY.title, charts.reliability),
    ("Decisions of steps", charts.decisions),
    ("Step time", charts.phases),
)


class StatsView:
    """Statistics of one job or of all jobs; `show` updates them."""

    def __init__(self) -> None:
        with box():
            heading("Numbers")
            self._figures = ui.element("dl").classes("figures")
        self._charts: list[tuple[ui.echart, Callable[[JobStats], dict[str, Any]]]] = []
        with ui.element("div").classes("charts"):
            for title, draw in _CHARTS:
                with box():
                    heading(title)
                    chart = ui.echart({}, renderer="svg").style("height:15rem;width:100%")
                    chart.props(f'role="img" aria-label="{title}"')
                    self._charts.append((chart, draw))
        with box():
            heading("By drafter")
            self._drafters = ui.element("div").classes("wide")
        self._shown: JobStats | None = None

    def show(self, stats: JobStats) -> None:
        """Show these statistics; send nothing to the browser if they are unchanged."""
        if stats == self._shown:
            return
        self._shown = stats
        self._figures.clear()
        with self._figures:
            for name, value, note in _figures(stats):
                figure(name, value, note)
        for chart, draw in self._charts:
            chart.options.clear()
            chart.options.update(draw(stats))
            chart.update()
        self._drafters.clear()
        with self._drafters:
            _drafter_table(stats)


def _figures(stats: JobStats) -> Sequence[tuple[str, str, str]]:
    basis = basis_text(stats.speedup, stats.plain_check, stats.plain_steps)
    compared = () if stats.comparison is None else (_speedup_check(stats.comparison),)
    return (
        ("Speed-up over plain", format.speedup(stats.speedup, stats.speedup_error), basis),
        *compared,
        ("Tokens per second", format.number(stats.tokens_per_s), f"over {format.span(stats.wall_s)}"),
        ("Tokens per step", format.number(stats.mean_acceptance_length, 2), f"{stats.steps:,d} steps"),
        ("Expected, accepted", _expected(stats), "draft tokens per step"),
        ("Off by", format.percent(stats.miscalibration), "accepted against expected draft tokens"),
        ("Draft nodes per step", format.number(stats.mean_tree_nodes, 2), ""),
        ("Tokens written", f"{stats.completion_tokens:,d}", f"{stats.prompt_tokens:,d} read"),
        ("From the cache", f"{stats.requests_cached:,d}", f"requests, {_cached_tokens(stats):,d} tokens: in no speed"),
        ("Tokens per joule", format.number(stats.tokens_per_joule, 2), "if the device reports energy"),
    )


def _speedup_check(check: SpeedupCheckStats) -> tuple[str, str, str]:
    fields = asdict(check)
    value = format.speedup(fields.pop("speedup"), fields.pop("speedup_error"))
    return "Compared with plain", value, check_text(**fields)


def _cached_tokens(stats: JobStats) -> int:
    return stats.cached_prompt_tokens + stats.cached_completion_tokens


def _expected(stats: JobStats) -> str:
    return f"{format.number(stats.mean_expected, 2)}, {format.number(stats.mean_accepted, 2)}"


def figure(name: str, value: str, note: str) -> None:
    """Add a figure to a `dl`: its name, its value, and a note below it."""
    with ui.element("div"):
        with ui.element("dt"):
            ui.label(name)
        with ui.element("dd"):
            ui.label(value)
            if note:
                with ui.element("small"):
                    ui.label(note)


def _drafter_table(stats: JobStats) -> None:
    rows = [
        (
            share.drafter or "no drafts",
            f"{share.steps:,d}",
            format.number(share.mean_tree_nodes, 2),
            format.number(share.mean_accepted, 2),
            format.speedup(share.speedup),
        )
        for share in stats.drafters
    ]
    table(("Drafter", "Steps", "Nodes", "Accepted", "Speed-up"), rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> None:
    """Add a table; all columns but the first `texts` are numbers."""
    with ui.element("table").classes("plain"):
        with ui.element("thead"), ui.element("tr"):
            for column, text in enumerate(headings):
                with ui.element("th").props('scope="col"').classes("n" if column >= texts else ""):
                    ui.label(text)
        with ui.element("tbody"):
            for row in rows:
                with ui.element("tr"):
                    for column, text in enumerate(row):
                        with ui.element("td").classes("n" if column >= texts else ""):
                            ui.label(text)
