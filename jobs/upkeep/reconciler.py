"""The reconciler: whatever was lost between the parts of the service is found in SQL and put right.

Runs in every worker and every shim, one elected at a time: requests whose worker is gone go back to the queue,
lost worker notifications are sent again, what is overdue expires, cancelled jobs end without their workers, comparisons
that kill their workers are given up, and dead workers are marked. Those that are not elected look for dead processes
too, for only neighbours see them. Every act may be repeated.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from jobs.messages import PartialEvent
from jobs.process_identity import follows, identity, is_dead
from jobs.producer import Notify
from jobs.streaming.events import failure_events, job_events
from storage import leases, writes
from storage.leader_election import elect, leader, resign
from storage.lease_recovery import WorkerProcess, mark_lost, reclaim, running_processes
from storage.records import HEARTBEAT_TIMEOUT_S, FailedRequest
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.speedup_checks import fail_checks
from storage.writes import Ended

log = logging.getLogger(__name__)

OFFICE = "reconciler"

_ROUND_S = 3.0
_TERM_S = 10.0  # a reconciler that is dead is succeeded after so long
_NOTIFY_AFTER_S = 10.0  # a job whose queued requests nobody took up for so long is notified again

Publish = Callable[[Sequence[PartialEvent]], None]


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round changed, to be told after its commit."""

    failed: tuple[FailedRequest, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)
    given_up: tuple[str, ...] = ()  # jobs that are not compared after all
    to_ring: tuple[tuple[str, str], ...] = ()  # (job_id, model)
    more: bool = False  # there was more to end than one round may take


class Reconciler:
    """One candidate for the office, with a thread of its own."""

    def __init__(self, database: Database, publish: Publish, notify: Notify, *, lease_s: float) -> None:
        """Take what the rounds need. Nothing runs before `start`."""
        self._database = database
        self._publish = publish
        self._notify = notify
        self._name = identity() or uuid.uuid4().hex  # neighbours on this machine see whether its holder is dead
        self._lease_s = lease_s
        self._more = False  # the next round has something to end at once
        self._connected_at: float | None = None  # since when the database has answered every time
        self._waits_for = ""  # why the database could do nothing in the last round
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="basic-reconciler", daemon=True)

    def start(self) -> None:
        """Begin with the rounds."""
        self._thread.start()

    def stop(self) -> None:
        """End the rounds and leave the office to the next."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_ROUND_S)
        try:
            with self._database.write() as session:
                resign(session, OFFICE, self._name)
        except DATABASE_UNAVAILABLE:
            pass  # the term ends by itself

    def round(self) -> bool:
        """Repair what can be repaired now; return whether we lead. Raise what DATABASE_UNAVAILABLE names."""
        try:
            with self._database.write() as session:
                elected = self._elected(session)
            done = self._reconcile() if elected else self._bury()
        except DATABASE_UNAVAILABLE:
            self._connected_at = None
            raise
        self._connected_at = self._connected_at or time.monotonic()
        self._tell(done)
        self._more = done.more
        return elected

    def _elected(self, session: Session) -> bool:
        predecessor = leader(session, OFFICE)
        if predecessor is not None and is_dead(predecessor):
            resign(session, OFFICE, predecessor)
        return elect(session, OFFICE, self._name, _TERM_S)

    def _reconcile(self) -> _Round:
        """Do every repair in a transaction of its own: locks are held for moments, and taken in one order."""
        write = self._database.write
        dead = self._dead()
        with write() as session:
            again = reclaim(session, dead, lapsed=self._owners_could_renew(), patience_s=self._lease_s)
        with write() as session:
            given_up = fail_checks(session, dead)
        with write() as session:  # after their requests are given back: whoever is marked is not looked at again
            mark_lost(session, dead, HEARTBEAT_TIMEOUT_S)
        late = self._in_pieces(writes.expire_requests)
        over = self._in_pieces(writes.end_jobs)
        with write() as session:
            unheard = leases.jobs_to_notify(session, _NOTIFY_AFTER_S)
        return _Round(
            failed=(*late.failed, *again.poisoned),
            ended_jobs=(*late.jobs, *over.jobs, *again.ended_jobs),
            given_up=tuple(given_up),
            to_ring=(*again.requeued, *unheard),
            more=late.more or over.more,
        )

    def _bury(self) -> _Round:
        """Give back what dead processes of this machine left: who holds the office may be unable to see them."""
        dead = self._dead()
        if not dead:
            return _Round()
        with self._database.write() as session:
            again = reclaim(session, dead, lapsed=False)
        with self._database.write() as session:
            given_up = fail_checks(session, dead)
        with self._database.write() as session:
            mark_lost(session, dead)
        return _Round(again.poisoned, again.ended_jobs, tuple(given_up), again.requeued)

    def _dead(self) -> list[str]:
        """Return the workers whose process has certainly ended."""
        with self._database.read() as session:
            running = running_processes(session)
        return [worker.worker_id for worker in running if is_dead(worker.process) or _is_followed(worker, running)]

    def _in_pieces(self, end: Callable[[Session], Ended]) -> Ended:
        """Let requests end a piece at a time, with as much time between them for others as each has taken."""
        pieces: list[Ended] = []
        round_ends_at = time.monotonic() + _ROUND_S
        while True:
            began_at = time.monotonic()
            with self._database.write() as session:
                pieces.append(end(session))
            if not pieces[-1].more or time.monotonic() > round_ends_at or self._stop.is_set():
                break
            self._stop.wait(time.monotonic() - began_at)
        jobs = (job for piece in pieces for job in piece.jobs)
        failed = (request for piece in pieces for request in piece.failed)
        return Ended(tuple(jobs), tuple(failed), pieces[-1].more)

    def _owners_could_renew(self) -> bool:
        """Return whether a lapsed lease means that its owner is gone: not while the database was away for everybody."""
        return self._connected_at is not None and time.monotonic() - self._connected_at >= self._lease_s

    def _tell(self, done: _Round) -> None:
        for request in done.failed:
            log.error(
                "Request %s of job %s failed: %s",
                request.custom_id,
                request.job_id,
                request.failure.message,
                extra={
                    "action": request.failure.code,
                    "job_id": request.job_id,
                    "request_index": request.request_index,
                },
            )
        for job_id in done.given_up:
            log.error("The comparison of job %s killed its workers: given up", job_id, extra=_compare(job_id))
        self._publish([*failure_events(done.failed), *job_events(done.ended_jobs)])
        one_a_model = {model: job_id for job_id, model in done.to_ring}
        for model, job_id in one_a_model.items():
            self._notify(job_id, model)

    def _note_away(self, why: str) -> None:
        """Say why nothing can be done: once, not every few seconds of an outage."""
        if why != self._waits_for:
            log.warning("The reconciler waits for the database: %s", why, extra=_AWAY)
        self._waits_for = why

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.round()
                self._waits_for = ""
            except DATABASE_UNAVAILABLE as error:
                self._note_away(unavailable_reason(error))
            except Exception:  # the thread must live: nobody else would notice that it is gone
                log.exception("A round of the reconciler failed", extra={"action": "reconciler_failed"})
            self._stop.wait(0.0 if self._more else _ROUND_S * random.uniform(0.8, 1.2))


def _is_followed(worker: WorkerProcess, running: Sequence[WorkerProcess]) -> bool:
    """Return whether another process has taken a worker's place in its container since it was last heard of."""
    return any(
        later.hostname == worker.hostname
        and later.started_at > worker.last_seen_at
        and follows(later.process, worker.process)
        for later in running
    )


def _compare(job_id: str) -> dict[str, str]:
    return {"action": "compare", "job_id": job_id}


_AWAY = {"action": "database_away"}
