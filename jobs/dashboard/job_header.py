"""The head of a job's page: what it is, how far it is, and what can be done with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal

from nicegui import ui

from jobs.api.dependencies import cancel_job, pause_or_resume
from jobs.api.write_threads import run_write
from jobs.dashboard import format, html
from jobs.dashboard.delete_dialog import DeleteDialog
from jobs.dashboard.layout import box, heading, link
from jobs.dashboard.session import BASE, PageContext
from jobs.dashboard.status import show_job_status, show_labels
from jobs.errors import BasicError, InvalidValue
from jobs.keys import Scope
from jobs.messages import JobStatus, Priority
from jobs.submission.intake import retry_job
from jobs.submission.managed.changes import change_job
from storage.budgets import BY_SECONDS, BY_TOKENS
from storage.pilots import BY_PILOT
from storage.priorities import priority_of
from storage.queries import JobView

# Without a secure context (plain HTTP to another host) a browser has no clipboard API.
_COPY: Final = """() => {
const text = %r;
if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
const field = document.createElement('textarea');
field.value = text; document.body.append(field); field.select(); document.execCommand('copy'); field.remove();
}"""


class JobHeader:
    """Name, id, status, progress and actions of the job."""

    def __init__(
        self, context: PageContext, job: JobView, refresh: Callable[[], Awaitable[None]], *, may_submit: bool
    ) -> None:
        """Add the elements; `show` fills them. `refresh` reads the job again after an action.

        Without `may_submit` there are no actions, only the download.
        """
        self._context = context
        self._job = job
        self._refresh = refresh
        self._may_submit = may_submit
        with box():
            with ui.element("div").classes("line"):
                with ui.element("div").classes("line grow beside"):
                    with ui.element("h1"):
                        self._name = ui.label()
                    self._copy_beside_title = _copy_button(job.id)
                self._status = ui.label().props('role="status"')
            with ui.element("div").classes("line beside") as self._id:
                ui.label(job.id).classes("mono dim")
                _copy_button(job.id)
            if job.verification_of is not None:
                with ui.element("div").classes("small"), link(f"{BASE}/jobs/{job.verification_of}"):
                    ui.label(f"Verification of {job.verification_of}").style("overflow-wrap:anywhere")
            self._about = ui.label().classes("dim small")
            self._labels = ui.element("div").classes("line").style("gap:.3rem")
            self._bar = ui.element("progress").props('max="1" aria-label="Ended requests"')
            with ui.element("div").classes("line"):
                self._counts = ui.label().classes("grow")
                self._speed = ui.label()
            self._why_paused = ui.label().classes("small")
            self._lay_out_actions(job)

    def _lay_out_actions(self, job: JobView) -> None:
        with ui.element("div").classes("line"):
            self._pause = self._action("Pause", partial(self._pause_or_resume, "pause"))
            self._resume = self._action("Resume", partial(self._pause_or_resume, "resume"))
            self._retry_button = self._action("Retry failed requests", self._retry)
            self._cancel_button = self._action("Cancel job", self._cancel).props("color=negative")
            self._edit_button = self._action("Edit", self._edit)
            self._delete_button = self._action("Delete", self._delete).props("color=negative")
            with link(f"{BASE}/jobs/{job.id}/outputs").props(f'download="{job.id}.jsonl"'):
                ui.label("Outputs (JSON lines)")

    def _action(self, name: str, act: Callable[[], Awaitable[None]]) -> ui.button:
        return ui.button(name, on_click=partial(self._do, act)).props("outline no-caps")

    def show(self, job: JobView) -> None:
        """Show the current state of the job."""
        self._job = job
        show_job_status(self._status, job)
        self._name.set_text(html.safe(job.name or job.id))
        self._id.set_visibility(job.name is not None)
        self._copy_beside_title.set_visibility(job.name is None)  # the id is the title
        parts = [job.model, job.endpoint, f"submitted {format.ago(job.created_at)}", *format.priority(job)]
        if job.max_concurrent is not None:
            parts.append(f"at most {job.max_concurrent:,d} requests at once")
        self._about.set_text(" · ".join(parts))
        show_labels(self._labels, job)
        self._bar.props(f"value={format.ended(job) / max(1, job.requests_total):.4f}")
        failed = f", {job.requests_failed:,d} failed" if job.requests_failed else ""
        cached = f", {job.requests_cached:,d} from the cache" if job.requests_cached else ""
        self._counts.set_text(f"{format.ended(job):,d} of {job.requests_total:,d} requests{cached}{failed}")
        rate = format.number(format.tokens_per_s(job))
        self._speed.set_text(f"{job.completion_tokens:,d} tokens · {rate} tokens/s · {format.left(job)}")
        self._why_paused.set_text(pause_text(job))
        self._why_paused.set_visibility(bool(pause_text(job)))
        self._show_actions(JobStatus(job.status), job.requests_completed < job.requests_total)

    def _show_actions(self, status: JobStatus, incomplete: bool) -> None:
        is_verification = self._job.verification_of is not None  # it goes with the job that it verifies
        for button, offered in (
            (self._pause, status is JobStatus.IN_PROGRESS),
            (self._resume, status is JobStatus.PAUSED),
            (self._cancel_button, status in (JobStatus.IN_PROGRESS, JobStatus.PAUSED)),
            (self._retry_button, status.final and incomplete and not is_verification),
            (self._edit_button, not is_verification),
            (self._delete_button, not is_verification),
        ):
            button.set_visibility(self._may_submit and offered)

    async def _do(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run an action and show the job again; show why it was refused."""
        try:
            await act()
        except BasicError as refused:
            ui.notify(html.safe(str(refused)), type="warning")
        await self._refresh()

    async def _cancel(self) -> None:
        caller = await self._context.authenticate(Scope.SUBMIT)
        await run_write(cancel_job, self._context.services, self._job, caller)

    async def _pause_or_resume(self, act: Literal["pause", "resume"]) -> None:
        caller = await self._context.authenticate(Scope.SUBMIT)
        await run_write(pause_or_resume, self._context.services, self._job, caller, act)

    async def _retry(self) -> None:
        caller = await self._context.authenticate(Scope.SUBMIT)
        services = self._context.services
        job_id = await run_write(
            retry_job,
            self._job,
            api_key_id=caller.key_id,
            idempotency_key=None,
            database=services.database,
            notify=services.notify,
            settings=services.settings,
        )
        ui.navigate.to(f"/jobs/{job_id}")

    async def _delete(self) -> None:
        DeleteDialog(self._context, self._job)

    async def _edit(self) -> None:
        _EditDialog(self._context, self._job, self._refresh)


def _copy_button(text: str) -> ui.button:
    button = ui.button(icon="content_copy", on_click=lambda: ui.notify("Copied"))
    button.props('flat dense round size=sm aria-label="Copy id"').on("click", js_handler=_COPY % text)
    return button


class _EditDialog:
    """Changes the name, labels, priority and concurrency limit of a job."""

    def __init__(self, context: PageContext, job: JobView, refresh: Callable[[], Awaitable[None]]) -> None:
        self._context, self._job, self._refresh = context, job, refresh
        with (
            ui.dialog(value=True).props('aria-label="Edit job"') as self._dialog,
            ui.card().style("width:28rem;max-width:95vw;background:var(--card)"),
        ):
            heading("Edit job")
            self._name = ui.input("Name", value=job.name or "")
            self._labels = ui.textarea("Labels, one key=value per line", value=_label_lines(job))
            open_ = not JobStatus(job.status).final
            self._priority = ui.select(
                [known.value for known in Priority], value=priority_of(job.priority_class).value, label="Priority"
            )
            self._limit = ui.number("Requests at once (empty: no limit)", value=job.max_concurrent, min=1, precision=0)
            self._tokens = ui.number("Budget in tokens (empty: none)", value=job.budget_tokens, min=1, precision=0)
            self._seconds = ui.number("Budget in seconds (empty: none)", value=job.budget_s, min=1)
            of_open_jobs = (self._priority, self._limit, self._tokens, self._seconds)
            for field in (self._name, self._labels, *of_open_jobs):
                field.props("outlined dense").style("width:100%")
            for field in of_open_jobs:
                field.set_visibility(open_)
            self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
            with ui.element("div").classes("line"):
                ui.button("Save", on_click=self._save).props("no-caps")
                ui.button("Close", on_click=self._dialog.close).props("flat no-caps")

    async def _save(self) -> None:
        try:
            await self._context.authenticate(Scope.SUBMIT)
            await run_write(change_job, self._job, self._changes(), self._context.services.database)
        except BasicError as refused:
            self._problem.set_text(html.safe(str(refused)))
            return
        self._context.services.notify(self._job.id, self._job.model)  # it may run more requests now
        self._dialog.close()
        await self._refresh()

    def _changes(self) -> dict[str, Any]:
        changes: dict[str, Any] = {
            "name": (self._name.value or "").strip() or None,
            "labels": dict.fromkeys(self._job.metadata or {}) | read_labels(self._labels.value or ""),
        }
        if not JobStatus(self._job.status).final:
            changes |= {
                "priority": self._priority.value,
                "max_concurrent": format.whole(self._limit.value),
                "budget": {"tokens": format.whole(self._tokens.value), "seconds": self._seconds.value},
            }
        return changes


def pause_text(job: JobView) -> str:
    """Return why the service paused a job, and what to do; empty if a caller did or it is not paused."""
    if job.status != JobStatus.PAUSED:
        return ""
    if job.pause_reason == BY_TOKENS:
        return f"Its budget of {job.budget_tokens or 0:,d} tokens is spent. Raise it with Edit, then press Resume."
    if job.pause_reason == BY_SECONDS:
        return f"Its budget of {job.budget_s or 0:,g} seconds is spent. Raise it with Edit, then press Resume."
    if job.pause_reason == BY_PILOT:
        return "Its pilot has ended. Resume runs the rest, Cancel job drops it."
    return ""


def _label_lines(job: JobView) -> str:
    return "\n".join(f"{key}={value}" for key, value in (job.metadata or {}).items())


def read_labels(text: str) -> dict[str, str]:
    """Return the labels of lines `key=value`; raise InvalidValue for other lines."""
    labels = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, given, value = line.partition("=")
        if not given or not key.strip():
            raise InvalidValue(f"{line[:80]!r} is no label; write key=value")
        labels[key.strip()] = value.strip()
    return labels
