"""The jobs page: find jobs, watch the progress of each, and submit a new one.

Reads the newest rows of `jobs` every _REFRESH_S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.dashboard import format, html
from jobs.dashboard.job_search import JobSearch
from jobs.dashboard.layout import frame, heading, link
from jobs.dashboard.new_job import new_job_dialog
from jobs.dashboard.session import BASE, PageContext
from jobs.dashboard.status import show_job_status, show_labels
from storage import queries
from storage.queries import JobView

_SHOWN: Final = 25
_REFRESH_S: Final = 2.0
_NO_JOBS: Final = "No jobs yet. Submit one with New job, or on the command line: basic submit FILE"
_NO_MATCH: Final = "No job matches."


async def build(context: PageContext, caller: Caller) -> None:
    """Build the list of jobs and the button that opens the dialog for a new one."""
    with frame("Jobs", context):
        with ui.element("div").classes("line"):
            with ui.element("div").classes("grow"):
                heading("Jobs", 1)
            dialog = await new_job_dialog(context)
            ui.button("New job", icon="add", on_click=dialog.open).props("no-caps")
        jobs = JobList(context, caller)
        await jobs.refresh()
        ui.timer(_REFRESH_S, jobs.refresh, immediate=False)


class JobList:
    """The newest jobs. Rows are updated in place, so that they keep the keyboard focus."""

    def __init__(self, context: PageContext, caller: Caller) -> None:
        """Add an empty list; `refresh` fills it."""
        self._context = context
        self._caller = caller
        self._limit = _SHOWN
        self._rows: dict[str, JobListRow] = {}
        self._search = JobSearch(self.refresh)
        self._list = ui.element("div").props('role="list" aria-label="Jobs"').classes("stack")
        with ui.element("div").classes("line") as self._empty:
            self._why_empty = ui.label().classes("dim")
            self._clear = ui.button("Show all jobs", on_click=self._search.clear).props("flat no-caps")
        self._more = ui.button("Older jobs", on_click=self._show_more).props("flat no-caps")

    async def refresh(self) -> None:
        """Show the current state of the jobs."""
        wanted = self._search.wanted(self._caller.sees)
        page = await self._context.read(lambda session: queries.jobs(session, self._limit, wanted=wanted))
        if wanted != self._search.wanted(self._caller.sees):  # the reader typed on meanwhile
            return
        self._show_empty(page.jobs)
        self._more.set_visibility(page.has_more)
        if [job.id for job in page.jobs] != list(self._rows):
            self._list.clear()
            with self._list:
                self._rows = {job.id: JobListRow(job) for job in page.jobs}
        for job in page.jobs:
            self._rows[job.id].show(job)

    def _show_empty(self, jobs: Sequence[JobView]) -> None:
        self._empty.set_visibility(not jobs)
        self._clear.set_visibility(self._search.given)
        self._why_empty.set_text(_NO_MATCH if self._search.given else _NO_JOBS)

    async def _show_more(self) -> None:
        self._limit += _SHOWN
        await self.refresh()


class JobListRow:
    """The row of one job in the list: name, id, labels, status, progress and speed."""

    def __init__(self, job: JobView) -> None:
        with ui.element("div").props('role="listitem"').classes("box job"):
            with ui.element("div").classes("stack").style("gap:.1rem"):
                with link(f"{BASE}/jobs/{job.id}"):
                    self._name = ui.label().style("font-weight:600;overflow-wrap:anywhere")
                    ui.label(job.id).classes("mono")
                self._about = ui.label().classes("dim small")
                self._labels = ui.element("div").classes("line").style("gap:.3rem")
            with ui.element("div").style("min-width:0"):
                self._bar = ui.element("progress").props('max="1" aria-label="Ended requests"')
                self._counts = ui.label().classes("small")
            self._speed = ui.label().classes("small")
            self._status = ui.label()
        self._shown: tuple[object, ...] = ()

    def show(self, job: JobView) -> None:
        """Show the current state of the job; send nothing to the browser if it is unchanged."""
        speed = f"{format.number(format.tokens_per_s(job), 1)} tokens/s · {format.left(job)}"
        about = " · ".join([job.model, format.ago(job.created_at), *format.priority(job)])
        managed = (job.name, tuple((job.metadata or {}).items()))
        values = (about, job.status, format.ended(job), job.requests_failed, job.completion_tokens, speed, managed)
        if values == self._shown:
            return
        if not self._shown or self._shown[-1] != managed:
            self._name.set_text(html.safe(job.name or ""))
            self._name.set_visibility(job.name is not None)
            show_labels(self._labels, job)
        self._shown = values
        self._about.set_text(about)
        self._bar.props(f"value={format.ended(job) / max(1, job.requests_total):.4f}")
        failed = f", {job.requests_failed:,d} failed" if job.requests_failed else ""
        self._counts.set_text(f"{format.ended(job):,d} of {job.requests_total:,d} requests{failed}")
        self._speed.set_text(speed)
        show_job_status(self._status, job)
