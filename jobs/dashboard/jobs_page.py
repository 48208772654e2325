"""The jobs page: the progress of each job, and a dialog that submits a small one.

Reads the newest rows of `jobs` every _REFRESH_S.
"""

from __future__ import annotations

import asyncio
from typing import Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.api.write_threads import run_write
from jobs.client.outcome import completed_with_failures, status_text
from jobs.dashboard import format, html
from jobs.dashboard.layout import BASE, frame, heading, link
from jobs.dashboard.session import PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.messages import TOOLS_TEMPERATURE, model_name
from jobs.submission.intake import Submission, create_job
from jobs.submission.items import Item
from jobs.submission.models import known_models
from storage import queries
from storage.job_filter import JobFilter
from storage.queries import JobView

_SHOWN: Final = 25
_REFRESH_S: Final = 2.0
_TREE_STEPS: Final = 32
_PROMPT_CHARS: Final = 150_000  # a socket message has the prompts as escaped JSON
_TOO_LONG: Final = (
    f"These prompts have {_PROMPT_CHARS:,d} characters or more, which is too long for this form. "
    "Write them to a file and run: basic submit FILE"
)


async def build(context: PageContext, caller: Caller) -> None:
    """Build the list of jobs and the button that opens the dialog for a new one."""
    with frame("Jobs", dark=context.dark, signed_in=context.signed_in):
        with ui.element("div").classes("line"):
            with ui.element("div").classes("grow"):
                heading("Jobs", 1)
            dialog = await _submit_dialog(context)
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
        self._list = ui.element("div").props('role="list" aria-label="Jobs"').classes("stack")
        self._empty = ui.label("No jobs yet.").classes("dim")
        self._more = ui.button("Older jobs", on_click=self._show_more).props("flat no-caps")

    async def refresh(self) -> None:
        """Show the current state of the jobs."""
        page = await self._context.read(
            lambda session: queries.jobs(session, self._limit, wanted=JobFilter(self._caller.sees))
        )
        self._empty.set_visibility(not page.jobs)
        self._more.set_visibility(page.has_more)
        if [job.id for job in page.jobs] != list(self._rows):
            self._list.clear()
            with self._list:
                self._rows = {job.id: JobListRow(job) for job in page.jobs}
        for job in page.jobs:
            self._rows[job.id].show(job)

    async def _show_more(self) -> None:
        self._limit += _SHOWN
        await self.refresh()


class JobListRow:
    """The row of one job in the list: id, status, progress and speed."""

    def __init__(self, job: JobView) -> None:
        with ui.element("div").props('role="listitem"').classes("box job"):
            with ui.element("div").classes("stack").style("gap:.1rem"):
                with link(f"{BASE}/jobs/{job.id}").classes("mono"):
                    ui.label(job.id)
                self._about = ui.label().classes("dim small")
            with ui.element("div").style("min-width:0"):
                self._bar = ui.element("progress").props('max="1" aria-label="Ended requests"')
                self._counts = ui.label().classes("small")
            self._speed = ui.label().classes("small")
            self._status = ui.label()
        self._shown: tuple[object, ...] = ()

    def show(self, job: JobView) -> None:
        """Show the current state of the job; send nothing to the browser if it is unchanged."""
        speed = f"{format.number(format.tokens_per_s(job), 1)} tokens/s · {format.left(job)}"
        about = f"{job.model} · {format.ago(job.created_at)}"
        values = (about, job.status, format.ended(job), job.requests_failed, job.completion_tokens, speed)
        if values == self._shown:
            return
        self._shown = values
        self._about.set_text(about)
        self._bar.props(f"value={format.ended(job) / max(1, job.requests_total):.4f}")
        failed = f", {job.requests_failed:,d} failed" if job.requests_failed else ""
        self._counts.set_text(f"{format.ended(job):,d} of {job.requests_total:,d} requests{failed}")
        self._speed.set_text(speed)
        show_job_status(self._status, job)


def show_job_status(label: ui.label, job: JobView) -> None:
    """Show the status of a job, as a warning if it completed with failed requests."""
    show_status(label, job.status)
    if completed_with_failures(job.status, job.requests_failed):
        label.set_text(status_text(job.status, job.requests_completed, job.requests_failed))
        label.classes(replace="status status-warning")


def show_status(label: ui.label, status: str) -> None:
    """Set a label to a status, in the colour of that status."""
    label.set_text(status.replace("_", " "))
    label.classes(replace=f"status status-{status}")


async def _submit_dialog(context: PageContext) -> ui.dialog:
    """Return the dialog that submits a new job."""
    settings = context.services.settings
    known = (await asyncio.to_thread(known_models, context.services.database, settings)).names
    with ui.dialog() as dialog, ui.card().style("width:34rem;max-width:95vw;background:var(--card)"):
        heading("New job")
        prompts = ui.textarea("Prompts, one per line").props("outlined autogrow autofocus")
        prompts.style("width:100%")
        prompts.props(f"maxlength={_PROMPT_CHARS}")  # a longer message would close the page's socket
        model = ui.select(known, value=model_name(settings.target), label="Model").props("outlined").style("width:100%")
        with ui.element("div").classes("line"):
            tokens = ui.number("Max tokens", value=128, min=1, precision=0).props("outlined dense").style("width:9rem")
            heat = ui.number("Temperature", value=TOOLS_TEMPERATURE, min=0, max=2, step=0.1)
            heat.props("outlined dense").style("width:9rem")
            trees = ui.checkbox("Record draft trees").props('aria-label="Record draft trees"')  # Quasar hides its own
        problem = ui.label().props('role="alert"').style("color:var(--bad)")

        async def submit() -> None:
            if (
                _javascript_length(prompts.value or "") >= _PROMPT_CHARS
            ):  # the browser may have cut the text at maxlength
                problem.set_text(_TOO_LONG)
                return
            lines = [line.strip() for line in (prompts.value or "").splitlines() if line.strip()]
            parameters = {"max_tokens": int(tokens.value or 1), "temperature": float(heat.value or 0)}
            if trees.value:
                parameters["record_trees"] = _TREE_STEPS
            try:
                job_id = await _submit(context, lines, str(model.value), parameters)
            except BasicError as refused:
                problem.set_text(html.safe(str(refused)))
                return
            dialog.close()
            ui.navigate.to(f"/jobs/{job_id}")

        with ui.element("div").classes("line"):
            ui.button("Submit", on_click=submit).props("no-caps")
            ui.button("Close", on_click=dialog.close).props("flat no-caps")
    return dialog


def _javascript_length(text: str) -> int:
    """Return the length of a text in UTF-16 code units, as JavaScript and `maxlength` count it."""
    return len(text.encode("utf-16-le", errors="surrogatepass")) // 2


async def _submit(context: PageContext, lines: list[str], model: str, parameters: dict[str, float]) -> str:
    caller = await context.authenticate(Scope.SUBMIT)
    submission = Submission(
        items=[Item(index, line) for index, line in enumerate(lines)],
        model=model,
        parameters=parameters,
        api_key_id=caller.key_id,
    )
    services = context.services
    return await run_write(
        create_job, submission, database=services.database, notify=services.notify, settings=services.settings
    )
