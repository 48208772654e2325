"""The page of all statistics: everything that ran, and the newest jobs beside each other.

app -> [stats_page] -> storage.statistics.
"""

from __future__ import annotations

from typing import Final

from nicegui import ui

from jobs.api.caller import Caller
from jobs.dashboard import words
from jobs.dashboard.desk import Desk
from jobs.dashboard.look import BASE, box, frame, heading, link
from jobs.dashboard.stats_view import StatsView
from storage import statistics
from storage.statistics import JobRow

_JOBS: Final = 20


async def build(desk: Desk, caller: Caller) -> None:
    """Build the page."""
    with frame("Statistics", dark=desk.dark, signed_in=desk.signed_in):
        heading("Statistics of all jobs", 1)
        place = ui.element("div").classes("stack")

    async def fill() -> None:
        """Show the numbers, behind the page itself."""
        stats = await desk.read(lambda session: statistics.total_stats(session, caller.sees))
        rows = await desk.read(lambda session: statistics.job_rows(session, _JOBS, caller.sees))
        with place:
            StatsView().show(stats)
            with box():
                heading("The newest jobs")
                with ui.element("div").classes("wide"):
                    _job_table(rows)

    ui.timer(0, fill, once=True)


def _job_table(rows: list[JobRow]) -> None:
    headings = ("Job", "Model", "Tokens", "Tokens/s", "Tokens/step", "Speed-up")
    with ui.element("table").classes("plain"):
        with ui.element("thead"), ui.element("tr"):
            for place, text in enumerate(headings):
                with ui.element("th").props('scope="col"').classes("n" if place > 1 else ""):
                    ui.label(text)
        with ui.element("tbody"):
            for row in rows:
                _job_line(row)


def _job_line(row: JobRow) -> None:
    numbers = (
        f"{row.completion_tokens:,d}",
        words.number(row.tokens_per_s),
        words.number(row.mean_acceptance_length, 2),
        words.speedup(row.speedup),
    )
    with ui.element("tr"):
        with ui.element("td"), link(f"{BASE}/jobs/{row.id}").classes("mono"):
            ui.label(f"{row.id[:18]}…")
        with ui.element("td"):
            ui.label(row.model)
        for text in numbers:
            with ui.element("td").classes("n"):
                ui.label(text)
