"""Keep what is learned about drafts in the database: a new process continues where workers of its kind stopped.

Without the database, or with a record that can't be read, the worker learns everything again. Texts never depend on it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from storage import speculation_states
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.speculation_states import DraftIdentity
from worker.engine.speculation.state import SpeculationState

log = logging.getLogger(__name__)

_STORE_S = 60.0  # between two writes of a worker that serves


class SpeculationStore:
    """The stored speculation state of one draft on one kind of device."""

    def __init__(self, database: Database, identity: DraftIdentity) -> None:
        """Use the row of `identity`."""
        self._database = database
        self._identity = identity
        self._record: dict[str, Any] | None = None  # not written yet
        self._recorded_at = time.monotonic()
        self._steps = 0  # of the state when it was recorded last

    def read(self, initial: SpeculationState) -> SpeculationState:
        """Return the initial state with what earlier processes have learned, if there is a record."""
        try:
            with self._database.read() as session:
                record = speculation_states.read(session, self._identity)
        except DATABASE_UNAVAILABLE as error:
            log.warning("What was learned about drafts was not read: %s", unavailable_reason(error), extra=_STORING)
            return initial
        return initial if record is None else initial.restored(record)

    def snapshot(self, state: SpeculationState, *, now: bool = False) -> None:
        """Record the state once a minute, or `now`, if steps were taken. Call it on the thread that changes it."""
        if state.steps == self._steps or not (now or time.monotonic() - self._recorded_at >= _STORE_S):
            return
        self._recorded_at, self._steps = time.monotonic(), state.steps
        self._record = state.record()

    def write(self) -> None:
        """Write the last snapshot, unless it is written; raises what the database raises."""
        record = self._record
        if record is None:
            return
        with self._database.write() as session:
            speculation_states.write(session, self._identity, record)
        if self._record is record:
            self._record = None


_STORING = {"action": "speculation_state"}
