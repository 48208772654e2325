"""The sink: commits the progress of all running requests in one transaction, then publishes it.

runner -> [sink] -> storage.writes, jobs.partials.  Nothing is published that is not committed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from jobs.errors import DatabaseUnavailable
from jobs.events import error_of, job_events
from jobs.messages import PartialEvent, Piece
from storage import writes
from storage.records import Checkpoint, FinishedChoice, FlushResult, Lease, Progress, Refusal, RequestKey
from storage.session import DATABASE_AWAY, Database, why_away
from worker import spans
from worker.live import LiveChoice, LiveRequest

log = logging.getLogger(__name__)

Publish = Callable[[Sequence[PartialEvent]], None]


class Sink:
    """Writes for one worker."""

    def __init__(self, database: Database, publish: Publish, worker_id: str, lease_s: float) -> None:
        """Write to `database` under leases of `lease_s` seconds, and hand events to `publish`."""
        self._database = database
        self._publish = publish
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._pending: list[tuple[LiveRequest, Progress]] = []  # not committed: the database did not answer

    def started(self, request: LiveRequest) -> None:
        """Announce the choices of a request that has just been taken up."""
        self._publish([e for choice in request.choices.values() for e in self._announce(request, choice)])

    def flush(self, requests: Sequence[LiveRequest], now: float) -> FlushResult:
        """Commit what is new, renew every lease, publish. Raises DatabaseUnavailable; nothing is lost, call again."""
        ended = {p.lease.key for _, p in self._pending if p.ends or p.refusal is not None}
        self._pending += [(r, r.progress(now)) for r in requests if r.claim.lease.key not in ended]
        progress = [p for _, p in self._pending]
        held = [request.claim.lease for request in requests]
        began_at = time.time()
        try:
            with self._database.write() as session:
                result = writes.flush(session, self._worker_id, self._lease_s, progress, held)
        except DATABASE_AWAY as error:
            raise DatabaseUnavailable(f"The database does not answer: {why_away(error)}") from error
        committed, self._pending = self._pending, []
        spans.committed([entry for entry in committed if entry[1].lease.key not in result.lost], began_at, time.time())
        self._publish([*self._events(committed, result.lost), *job_events(result.ended_jobs)])
        for job_id, status in result.ended_jobs:
            log.info("Job %s is %s", job_id, status, extra={"action": "job_ended", "job_id": job_id})
        return result

    def _announce(self, request: LiveRequest, choice: LiveChoice) -> Iterator[PartialEvent]:
        if not choice.announced:
            choice.announced = True
            yield self._event(request, choice.index, choice.next_seq, type="started")
            choice.next_seq += 1

    def _events(
        self, committed: Sequence[tuple[LiveRequest, Progress]], lost: frozenset[RequestKey]
    ) -> Iterator[PartialEvent]:
        for request, progress in committed:
            if progress.lease.key in lost:
                log.warning(
                    "Request %s is no longer ours; its progress was dropped",
                    request.claim.custom_id,
                    extra={"action": "lease_lost", **_ids(progress.lease)},
                )
                continue
            yield from (self._tokens(request, checkpoint) for checkpoint in progress.checkpoints)
            yield from (self._finished(request, finished) for finished in progress.finished)
            if progress.refusal is not None:
                _log_refusal(progress.lease, progress.refusal)
                error = error_of(progress.refusal)
                yield self._event(request, 0, request.failure_seq, type="failed", error=error)

    def _tokens(self, request: LiveRequest, checkpoint: Checkpoint) -> PartialEvent:
        return self._event(
            request,
            checkpoint.choice_index,
            checkpoint.seq,
            type="tokens",
            text=checkpoint.text,
            pieces=tuple(Piece.model_validate({"text": text, "source": source}) for text, source in checkpoint.pieces),
            tokens=len(checkpoint.token_ids),
            accepted=sum(checkpoint.accepted),
        )

    def _finished(self, request: LiveRequest, finished: FinishedChoice) -> PartialEvent:
        return self._event(
            request,
            finished.choice_index,
            finished.last_seq,
            type="finished",
            finish_reason=finished.finish_reason,
        )

    @staticmethod
    def _event(request: LiveRequest, choice: int, seq: int, **fields: object) -> PartialEvent:
        lease = request.claim.lease
        identity = {"job_id": lease.job_id, "request": request.claim.custom_id, "index": lease.request_index}
        return PartialEvent.model_validate({**identity, "choice": choice, "seq": seq, **fields})


def _log_refusal(lease: Lease, refusal: Refusal) -> None:
    ids = _ids(lease)
    log.info("A request failed: %s: %s", refusal.code, refusal.message, extra={"action": "request_failed", **ids})


def _ids(lease: Lease) -> dict[str, object]:
    return {"job_id": lease.job_id, "request_index": lease.request_index}
