"""Find jobs and requests that a failure left behind, and repair them in SQL.

Every worker and API server runs a reconciler; one of them is the leader. The leader returns the requests of dead
workers to the queue, notifies workers again, expires overdue requests, ends cancelled jobs, gives up speed-up checks
that crash workers, and marks dead workers. The others only look for dead processes on their own machine, which the
leader may be unable to see. All repairs are idempotent.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from jobs.messages import PartialEvent
from jobs.process_identity import follows, is_dead
from jobs.producer import Notify
from jobs.streaming.events import failure_events, job_events
from jobs.upkeep.rounds import Leadership, Rounds
from storage import leases, writes
from storage.lease_recovery import WorkerProcess, mark_lost, reclaim, running_processes
from storage.records import HEARTBEAT_TIMEOUT_S, FailedRequest
from storage.session import DATABASE_UNAVAILABLE, Database
from storage.speedup_checks import fail_checks
from storage.writes import Ended

log = logging.getLogger(__name__)

ROLE = "reconciler"

_ROUND_S = 3.0
_TERM_S = 10.0  # a dead leader is replaced after this time
_NOTIFY_AFTER_S = 10.0  # workers are notified again of requests that stay queued for this time

Publish = Callable[[Sequence[PartialEvent]], None]


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round changed: published after its commit."""

    failed: tuple[FailedRequest, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)
    failed_checks: tuple[str, ...] = ()  # jobs whose speed-up check was given up
    to_notify: tuple[tuple[str, str], ...] = ()  # (job_id, model)
    more: bool = False  # the round ended before all requests did


class Reconciler:
    """Runs rounds of repairs in a thread of its own, as leader or not."""

    def __init__(self, database: Database, publish: Publish, notify: Notify, *, lease_s: float) -> None:
        self._database = database
        self._publish = publish
        self._notify = notify
        self._lease_s = lease_s
        self._more = False  # the next round starts at once
        self._connected_at: float | None = None  # time since which every database access succeeded
        self.leadership = Leadership(database, ROLE, _TERM_S)
        self._rounds = Rounds("reconciler", self.run_once, self._pause_s, log)

    def start(self) -> None:
        """Start the thread."""
        self._rounds.start()

    def stop(self) -> None:
        """Stop the thread and resign as leader."""
        self._rounds.stop(_ROUND_S)
        self.leadership.resign()

    def requeue(self, worker_id: str) -> None:
        """Requeue the requests of a worker whose request process has died; they are suspects, as after its own death.

        Raise what DATABASE_UNAVAILABLE names.
        """
        with self._database.write() as session:
            reclaimed = reclaim(session, [worker_id], lapsed=False)
        self._publish_changes(_Round(reclaimed.poisoned, reclaimed.ended_jobs, (), reclaimed.requeued))

    def run_once(self) -> bool:
        """Repair what can be repaired now; return whether we lead. Raise what DATABASE_UNAVAILABLE names."""
        try:
            with self._database.write() as session:
                elected = self.leadership.elect(session)
            done = self._reconcile() if elected else self._release_dead_workers()
        except DATABASE_UNAVAILABLE:
            self._connected_at = None
            raise
        self._connected_at = self._connected_at or time.monotonic()
        self._publish_changes(done)
        self._more = done.more
        return elected

    def _reconcile(self) -> _Round:
        """Make each repair in its own transaction: locks are held briefly and always taken in the same order."""
        write = self._database.write
        dead = self._dead()
        with write() as session:
            reclaimed = reclaim(session, dead, lapsed=self._owners_could_renew(), patience_s=self._lease_s)
        with write() as session:
            failed_checks = fail_checks(session, dead)
        with write() as session:  # last, because running_processes() skips workers that are marked
            mark_lost(session, dead, HEARTBEAT_TIMEOUT_S)
        expired = self._in_batches(writes.expire_requests)
        ended = self._in_batches(writes.end_jobs)
        with write() as session:
            unnotified = leases.jobs_to_notify(session, _NOTIFY_AFTER_S)
        return _Round(
            failed=(*expired.failed, *reclaimed.poisoned),
            ended_jobs=(*expired.jobs, *ended.jobs, *reclaimed.ended_jobs),
            failed_checks=tuple(failed_checks),
            to_notify=(*reclaimed.requeued, *unnotified),
            more=expired.more or ended.more,
        )

    def _release_dead_workers(self) -> _Round:
        """Return the requests of dead processes of this machine to the queue: the leader may run on another machine."""
        dead = self._dead()
        if not dead:
            return _Round()
        with self._database.write() as session:
            reclaimed = reclaim(session, dead, lapsed=False)
        with self._database.write() as session:
            failed_checks = fail_checks(session, dead)
        with self._database.write() as session:
            mark_lost(session, dead)
        return _Round(reclaimed.poisoned, reclaimed.ended_jobs, tuple(failed_checks), reclaimed.requeued)

    def _dead(self) -> list[str]:
        """Return the ids of workers whose process has certainly ended."""
        with self._database.read() as session:
            running = running_processes(session)
        return [worker.worker_id for worker in running if is_dead(worker.process) or _is_followed(worker, running)]

    def _in_batches(self, end: Callable[[Session], Ended]) -> Ended:
        """End requests in batches, with pauses as long as the batches, in which other transactions can run."""
        batches: list[Ended] = []
        round_ends_at = time.monotonic() + _ROUND_S
        while True:
            began_at = time.monotonic()
            with self._database.write() as session:
                batches.append(end(session))
            if not batches[-1].more or time.monotonic() > round_ends_at or self._rounds.stopping.is_set():
                break
            self._rounds.stopping.wait(time.monotonic() - began_at)
        jobs = (job for batch in batches for job in batch.jobs)
        failed = (request for batch in batches for request in batch.failed)
        return Ended(tuple(jobs), tuple(failed), batches[-1].more)

    def _owners_could_renew(self) -> bool:
        """Return whether an expired lease means a dead owner: not if the database was unavailable during the lease."""
        return self._connected_at is not None and time.monotonic() - self._connected_at >= self._lease_s

    def _publish_changes(self, done: _Round) -> None:
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
        for job_id in done.failed_checks:
            log.error(
                "The speed-up check of job %s crashed its workers and was given up", job_id, extra=_compare(job_id)
            )
        self._publish([*failure_events(done.failed), *job_events(done.ended_jobs)])
        one_per_model = {model: job_id for job_id, model in done.to_notify}
        for model, job_id in one_per_model.items():
            self._notify(job_id, model)

    def _pause_s(self) -> float:
        return 0.0 if self._more else _ROUND_S * random.uniform(0.8, 1.2)


def _is_followed(worker: WorkerProcess, running: Sequence[WorkerProcess]) -> bool:
    """Return whether the worker's container has restarted: a later process of it has replaced the worker."""
    return any(
        later.hostname == worker.hostname
        and later.started_at > worker.last_seen_at
        and follows(later.process, worker.process)
        for later in running
    )


def _compare(job_id: str) -> dict[str, str]:
    return {"action": "compare", "job_id": job_id}
