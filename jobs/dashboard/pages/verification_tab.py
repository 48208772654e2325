"""The tab of a job's page that verifies it: start a verification, watch it, read its result, save its signed report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.api.dependencies import cancel_job
from jobs.api.write_threads import run_write
from jobs.dashboard import format, html
from jobs.dashboard.layout import box, link
from jobs.dashboard.session import BASE, PageContext
from jobs.dashboard.stats_view import table
from jobs.dashboard.status import show_status
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.messages import JobStatus
from jobs.verification.report import verification_report
from jobs.verification.sample import DEFAULT_SAMPLE, start_verification
from storage import queries
from storage.job_filter import JobFilter
from storage.queries import JobView

_SHOWN: Final = 10  # verifications
_SHOWN_REQUESTS: Final = 20  # of a verification, that are not equal
_ABOUT: Final = (
    "A text depends on its request alone, so it can be computed again and compared. The workers of the model compute a "
    "random sample of the completed requests again, in another batch and without drafts."
)
_NONE: Final = "No verification yet. Choose a sample and press Verify, or run: basic verify "
_NOT_YET: Final = "No request has completed yet: there is nothing to compute again."
_COLUMNS: Final = ("Request", "Name", "Result", "Reason")


class VerificationTab:
    """The verifications of a job, newest first."""

    def __init__(self, context: PageContext, caller: Caller, *, may_submit: bool) -> None:
        self._context, self._caller, self._may_submit = context, caller, may_submit
        self._cards: dict[str, _Card] = {}

    def lay_out(self, job: JobView) -> None:
        """Add the form and an empty list; `show` fills it."""
        self._job = job
        with ui.element("div").classes("stack"):
            ui.label(_ABOUT).classes("dim")
            with ui.element("div").classes("line") as self._form:
                self._sample = ui.input("Sample: a share or a number", value=DEFAULT_SAMPLE)
                self._sample.props("outlined dense").style("width:14rem").on("keydown.enter", self._start)
                ui.button("Verify", on_click=self._start).props("outline no-caps")
            self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
            self._none = ui.label().classes("dim")
            self._list = ui.element("div").props('role="list" aria-label="Verifications"').classes("stack")

    async def show(self, job: JobView) -> None:
        """Read the verifications and show them."""
        self._job = job
        wanted = JobFilter(self._caller.sees, verification_of=job.id)
        page = await self._context.read(lambda session: queries.jobs(session, _SHOWN, wanted=wanted))
        self._form.set_visibility(self._may_submit and job.requests_completed > 0)
        self._none.set_text(_NONE + job.id if job.requests_completed else _NOT_YET)
        self._none.set_visibility(not page.jobs)
        if [found.id for found in page.jobs] != list(self._cards):
            self._list.clear()
            with self._list:
                self._cards = {found.id: _Card(found, self._cancel, self._may_submit) for found in page.jobs}
        for found in page.jobs:
            card = self._cards[found.id]
            card.show(found)
            if JobStatus(found.status).final and not card.has_report:
                card.show_report(await asyncio.to_thread(verification_report, found, job, self._database))

    @property
    def _database(self) -> Any:
        return self._context.services.database

    async def _start(self) -> None:
        services = self._context.services

        async def start() -> None:
            await self._context.authenticate(Scope.SUBMIT)
            await run_write(
                start_verification,
                self._job,
                (self._sample.value or "").strip(),
                database=services.database,
                notify=services.notify,
                settings=services.settings,
            )

        await self._do(start)

    async def _cancel(self, verification: JobView) -> None:
        async def cancel() -> None:
            caller = await self._context.authenticate(Scope.SUBMIT)
            await run_write(cancel_job, self._context.services, verification, caller, "verification")

        await self._do(cancel)

    async def _do(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run an action and show the list again, and why it was refused."""
        self._problem.set_text("")
        try:
            await act()
        except BasicError as refused:
            self._problem.set_text(html.safe(str(refused)))
        await self.show(self._job)


class _Card:
    """One verification: its progress, then its counts, what is not equal, and its report."""

    def __init__(self, found: JobView, cancel: Callable[[JobView], Awaitable[None]], may_submit: bool) -> None:
        self.has_report = False
        self._may_submit = may_submit
        with box().props('role="listitem"'):
            with ui.element("div").classes("line"):
                with ui.element("div").classes("grow"), link(f"{BASE}/jobs/{found.id}").classes("mono"):
                    ui.label(found.id)
                self._status = ui.label()
            self._progress = ui.label().classes("dim small")
            self._result = ui.element("div").classes("stack")
            self._cancel = ui.button("Cancel", on_click=partial(cancel, found))
            self._cancel.props("outline no-caps color=negative").style("align-self:start")

    def show(self, found: JobView) -> None:
        """Show the progress."""
        show_status(self._status, found.status)
        sample = (found.metadata or {}).get("sample", "")
        parts = [f"sample {sample}", f"{format.ended(found):,d} of {found.requests_total:,d} requests computed"]
        self._progress.set_text(" · ".join([*parts, f"started {format.ago(found.created_at)}"]))
        open_ = JobStatus(found.status) in (JobStatus.IN_PROGRESS, JobStatus.PAUSED)
        self._cancel.set_visibility(open_ and self._may_submit)

    def show_report(self, report: dict[str, Any]) -> None:
        """Show the result of an ended verification."""
        self.has_report = True
        counts = report["counts"]
        odd = [request for request in report["requests"] if request["result"] != "equal"]
        with self._result:
            words = ", ".join(f"{count:,d} {verdict.replace('_', ' ')}" for verdict, count in counts.items())
            ui.label(words).style("font-weight:600;" + ("color:var(--bad)" if counts["different"] else ""))
            if odd:
                with ui.element("div").classes("wide"):
                    table(_COLUMNS, list(map(_row, odd[:_SHOWN_REQUESTS])), texts=len(_COLUMNS))
            if len(odd) > _SHOWN_REQUESTS:
                ui.label(f"and {len(odd) - _SHOWN_REQUESTS:,d} more, which the report names").classes("dim small")
            with link(f"{BASE}/verifications/{report['id']}/report").props(f'download="{report["id"]}.json"'):
                ui.label("Signed report (JSON)")


def _row(request: dict[str, Any]) -> tuple[str, str, str, str]:
    name, reason = html.safe(request["custom_id"]), html.safe(request["reason"] or "")
    return str(request["index"]), name, request["result"].replace("_", " "), reason
