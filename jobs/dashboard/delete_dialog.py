"""The dialog that deletes a job: it names what will be erased, and asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nicegui import ui

from jobs.api.dependencies import delete_job
from jobs.api.write_threads import run_write
from jobs.dashboard import html
from jobs.dashboard.layout import heading
from jobs.dashboard.session import PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.messages import JobStatus
from storage.queries import JobView

_FOR_GOOD: Final = "This can't be undone. Backups and what was downloaded stay."


class DeleteDialog:
    """Asks whether a job shall be deleted; leaves to the list of jobs when it is."""

    def __init__(self, context: PageContext, job: JobView) -> None:
        """Open the dialog."""
        self._context, self._job = context, job
        with (
            ui.dialog(value=True).props('aria-label="Delete job"') as self._dialog,
            ui.card().style("width:30rem;max-width:95vw;background:var(--card)"),
        ):
            heading(f"Delete {html.safe(job.name or job.id)}?")
            ui.label("This erases from the database, and from the disk of the service:")
            with ui.element("ul").style("margin:0;padding-left:1.2rem"):
                for part in erased_parts(job):
                    with ui.element("li"):
                        ui.label(part)
            if not self._has_ended:
                ui.label("The job still runs. It is cancelled first.").style("font-weight:600")
            ui.label(_FOR_GOOD).classes("dim small")
            self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
            with ui.element("div").classes("line"):
                act = "Delete" if self._has_ended else "Cancel and delete"
                ui.button(act, on_click=self._delete).props("no-caps color=negative")
                ui.button("Keep the job", on_click=self._dialog.close).props("flat no-caps autofocus")

    @property
    def _has_ended(self) -> bool:
        return JobStatus(self._job.status).final

    async def _delete(self) -> None:
        try:
            await self._context.authenticate(Scope.SUBMIT)
            await run_write(delete_job, self._context.services, self._job, cancel=not self._has_ended)
        except BasicError as refused:  # it may run again since the dialog was opened
            self._problem.set_text(html.safe(str(refused)))
            return
        self._dialog.close()
        ui.navigate.to("/")


def erased_parts(job: JobView) -> Iterator[str]:
    """Yield what deleting a job erases, with its numbers."""
    if job.prompts_deleted_at is None:
        yield _counted(job.requests_total, "prompt")
    if job.outputs_deleted_at is None:
        texts = _counted(job.requests_completed, "answer")
        if not JobStatus(job.status).final:
            texts += " and the texts so far"
        yield f"{texts}: text, tokens, log-probabilities, draft trees"
    if job.requests_failed:
        yield _counted(job.requests_failed, "error")
    yield "its steps and statistics, and its part of the statistics of all jobs"
    yield "its uploaded and written files, unless another job reads them"
    yield "its verifications, webhooks and their deliveries"


def _counted(count: int, noun: str) -> str:
    return f"{count:,d} {noun}{'' if count == 1 else 's'}"
