"""Rounds of work that one process at a time leads: their thread, and the election."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy.orm import Session

from jobs.process_identity import identity, is_dead
from storage.leader_election import elect, leader, resign
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason

_AWAY: Final[dict[str, Any]] = {"action": "database_away"}


class Leadership:
    """A role that one process at a time has."""

    def __init__(self, database: Database, role: str, term_s: float) -> None:
        """Stand for `role`; a dead leader of another machine is replaced after `term_s`."""
        self.name = identity() or uuid.uuid4().hex  # processes of this machine can tell whether it is alive
        self._database = database
        self._role = role
        self._term_s = term_s

    def elect(self, session: Session) -> bool:
        """Take or renew the role if it is free, or if its holder is a dead process of this machine; return whether."""
        current = leader(session, self._role)
        if current is not None and is_dead(current):
            resign(session, self._role, current)
        return elect(session, self._role, self.name, self._term_s)

    def resign(self) -> None:
        """Give the role up; if the database is unavailable, the term expires."""
        try:
            with self._database.write() as session:
                resign(session, self._role, self.name)
        except DATABASE_UNAVAILABLE:
            pass


class Rounds:
    """Repeats work in a thread, whatever it raises. An outage of the database is logged once."""

    def __init__(self, name: str, run_once: Callable[[], object], pause_s: Callable[[], float], log: logging.Logger):
        """Call `run_once` with pauses of `pause_s()` between the calls."""
        self.stopping = threading.Event()
        self._name = name
        self._run_once = run_once
        self._pause_s = pause_s
        self._log = log
        self._unavailable = ""  # why the database was unavailable in the last round
        self._thread = threading.Thread(target=self._run, name=f"basic-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop the thread after its transaction, and wait up to `timeout_s` for its end."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                self._run_once()
                self._unavailable = ""
            except DATABASE_UNAVAILABLE as error:
                self._log_unavailable(unavailable_reason(error))
            except Exception:  # the thread must survive, because nothing restarts it
                self._log.exception("A round of the %s failed", self._name, extra={"action": f"{self._name}_failed"})
            self.stopping.wait(self._pause_s())

    def _log_unavailable(self, why: str) -> None:
        """Log why the database is unavailable, once per outage and reason."""
        if why != self._unavailable:
            self._log.warning("The %s waits for the database: %s", self._name, why, extra=_AWAY)
        self._unavailable = why
