"""What the rest of a job takes, shown on its page while it waits after its pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from nicegui import ui
from sqlalchemy.orm import Session

from jobs.client.durations import duration_text
from jobs.dashboard.layout import box, heading
from jobs.dashboard.session import PageContext
from jobs.dashboard.stats_view import figure
from jobs.messages import JobStatus
from jobs.reports.pilot.estimate import Estimate, Interval, estimate
from jobs.reports.pilot.record import pilot_of, power_of
from storage import queries
from storage.pilots import BY_PILOT, PilotRecord, read_pilot
from storage.queries import JobView, WorkerView

_UNKNOWN: Final = "unknown"
_NO_ANSWER: Final = "No request of the pilot has completed, so nothing can be predicted."
_J_PER_WH: Final = 3600.0


class PilotEstimate:
    """Predicted tokens, time and energy, each with its 90 % interval."""

    def __init__(self, context: PageContext) -> None:
        """Add nothing yet: `show` adds a box while the job waits."""
        self._context = context
        self._paused_at: float | None = None  # of the pause that is shown
        self._place = ui.element("div")
        self._place.set_visibility(False)

    async def show(self, job: JobView) -> None:
        """Predict once for each pause after a pilot; show nothing at other times."""
        waits = job.status == JobStatus.PAUSED and job.pause_reason == BY_PILOT
        paused_at = job.paused_at if waits else None
        if paused_at == self._paused_at:
            return
        self._paused_at = paused_at
        self._place.clear()
        self._place.set_visibility(waits)
        if waits:
            await self._predict(job)

    async def _predict(self, job: JobView) -> None:

        def read(session: Session) -> tuple[PilotRecord | None, list[WorkerView]]:
            return read_pilot(session, job.id), queries.live_workers_of(session, job.model)

        record, workers = await self._context.read(read)
        found = None if record is None else await asyncio.to_thread(lambda: estimate(pilot_of(record, workers)))
        with self._place, box():
            heading("Estimate of the rest")
            if record is None or found is None:
                ui.label(_NO_ANSWER).classes("dim")
                return
            power_w, _ = power_of(workers)
            with ui.element("dl").classes("figures"):
                self._fill(found, len(record.waiting), power_w)

    @staticmethod
    def _fill(found: Estimate, waiting: int, power_w: float | None) -> None:
        figure("Requests that wait", f"{waiting:,d}", "after the pilot, whose answers count")
        figure("Time", *_interval(found.seconds, duration_text))
        figure("Completion tokens", *_interval(found.completion_tokens, _whole))
        figure("Prompt tokens", *_interval(found.prompt_tokens, _whole))
        if power_w is None:
            figure("Energy", _UNKNOWN, "nothing measures the power of the workers; see BASIC_POWER_W")
        else:
            figure("Energy", *_interval(found.joules, lambda joules: f"{joules / _J_PER_WH:,.1f} Wh"))


def _interval(found: Interval | None, text: Callable[[float], str]) -> tuple[str, str]:
    """Return an estimate and its interval in words."""
    if found is None:
        return _UNKNOWN, "no step was measured"
    return text(found.estimate), f"{text(found.low)} to {text(found.high)}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"
