"""The search bar of the list of jobs: by words, status and label."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from nicegui import ui

from jobs.api.submissions import read_label
from jobs.errors import InvalidValue
from jobs.messages import JobStatus
from storage.job_filter import JobFilter

_ANY: Final = "any"
_STATUSES: Final = {_ANY: "Any status"} | {
    status.value: status.value.replace("_", " ").capitalize() for status in JobStatus
}
_WAIT_MS: Final = 300  # after the last key


class JobSearch:
    """Inputs whose values are a filter of jobs."""

    def __init__(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Add the inputs; call `on_change` after each change."""
        self._on_change = on_change
        with ui.element("div").props('role="search" aria-label="Jobs"').classes("line search"):
            self._words = ui.input("Search names, labels and ids").classes("grow")
            self._label = ui.input("Label", placeholder="team=search")
            self._status = ui.select(_STATUSES, value=_ANY, label="Status").style("min-width:9rem")
            for field in (self._words, self._label):
                field.props(f"outlined dense clearable debounce={_WAIT_MS}")
            self._status.props("outlined dense")
        for changed in (self._words, self._label, self._status):
            changed.on_value_change(on_change)

    @property
    def given(self) -> bool:
        """True if the filter excludes any job."""
        return bool(self._words.value or self._label.value or self._status.value != _ANY)

    def wanted(self, owner: str | None) -> JobFilter:
        """Return the filter, for jobs of an owner; None: of all. A label without a key is marked and not applied."""
        try:
            labels = (read_label(self._label.value.strip()),) if self._label.value else ()
            self._label.error = None
        except InvalidValue:
            self._label.error = "A label is key=value, or a key."
            labels = ()
        statuses = () if self._status.value == _ANY else (str(self._status.value),)
        return JobFilter(owner, statuses=statuses, labels=labels, search=(self._words.value or "").strip())

    async def clear(self) -> None:
        """Empty all inputs, and show the list once."""
        self._words.value = self._label.value = ""
        self._status.value = _ANY
        await self._on_change()
