"""Show the status and the labels of a job."""

from __future__ import annotations

from nicegui import ui

from jobs.client.outcome import completed_with_failures, status_text
from jobs.dashboard import html
from storage.queries import JobView


def show_labels(shown: ui.element, job: JobView) -> None:
    """Show the labels of a job in place of what an element held."""
    shown.clear()
    with shown:
        for key, value in (job.metadata or {}).items():
            ui.label(html.safe(f"{key}={value}")).classes("tag")


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
