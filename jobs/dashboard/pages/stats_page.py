"""The statistics page: all jobs together, and the newest jobs in a table."""

from __future__ import annotations

from typing import Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.dashboard import format
from jobs.dashboard.layout import box, frame, heading, link
from jobs.dashboard.session import BASE, PageContext
from jobs.dashboard.stats_view import StatsView
from storage import statistics
from storage.statistics import JobSummary

_JOBS: Final = 20
_REFRESH_S: Final = 5.0
_NO_JOBS: Final = "No job has run yet. Submit one on the page Jobs, or on the command line: basic submit FILE"


async def build(context: PageContext, caller: Caller) -> None:
    """Build an empty page and fill it from a timer, so that it is shown before the statistics are read."""
    with frame("Statistics", context):
        heading("Statistics of all jobs", 1)
        page = StatsPage(context, caller)
        ui.timer(_REFRESH_S, page.refresh)  # show the page before its statistics are read


class StatsPage:
    """Statistics of all jobs together, and a table of the newest jobs."""

    def __init__(self, context: PageContext, caller: Caller) -> None:
        """Add an empty container; `refresh` fills it."""
        self._context = context
        self._sees = caller.sees
        self._none = ui.label(_NO_JOBS).classes("dim")
        self._none.set_visibility(False)
        self._container = ui.element("div").classes("stack")
        self._numbers: StatsView | None = None  # created with the first statistics
        self._shown: list[JobSummary] = []

    async def refresh(self) -> None:
        """Show the current statistics."""
        stats = await self._context.read(lambda session: statistics.total_stats(session, self._sees))
        rows = await self._context.read(lambda session: statistics.job_summaries(session, _JOBS, self._sees))
        self._none.set_visibility(not rows)
        self._container.set_visibility(bool(rows))
        if not rows:
            return
        if self._numbers is None:
            with self._container:
                self._numbers = StatsView()
                with box():
                    heading("Newest jobs")
                    self._jobs = ui.element("div").classes("wide")
        self._numbers.show(stats)
        if rows != self._shown:
            self._shown = rows
            self._jobs.clear()
            with self._jobs:
                _job_table(rows)


def _job_table(rows: list[JobSummary]) -> None:
    headings = ("Job", "Model", "Tokens", "Tokens/s", "Tokens/step", "Speed-up")
    with ui.element("table").classes("plain"):
        with ui.element("thead"), ui.element("tr"):
            for column, text in enumerate(headings):
                with ui.element("th").props('scope="col"').classes("n" if column > 1 else ""):
                    ui.label(text)
        with ui.element("tbody"):
            for row in rows:
                _job_line(row)


def _job_line(row: JobSummary) -> None:
    numbers = (
        f"{row.completion_tokens:,d}",
        format.number(row.tokens_per_s),
        format.number(row.mean_acceptance_length, 2),
        format.speedup(row.speedup),
    )
    with ui.element("tr"):
        with ui.element("td"), link(f"{BASE}/jobs/{row.id}").classes("mono"):
            ui.label(f"{row.id[:18]}…")
        with ui.element("td"):
            ui.label(row.model)
        for text in numbers:
            with ui.element("td").classes("n"):
                ui.label(text)
