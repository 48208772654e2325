"""Commit the progress of all active requests in one transaction, then publish it.

Only committed progress is published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jobs.errors import DatabaseUnavailable
from jobs.messages import PartialEvent, Piece
from jobs.streaming.events import error_of, job_events
from storage import cached_answers, writes
from storage.cached_answers import CacheScope, Copied, CopiedAnswer
from storage.dialect import storable
from storage.records import Checkpoint, FinishedChoice, FlushResult, Lease, RequestFailure, RequestKey, RequestProgress
from storage.session import DATABASE_UNAVAILABLE, Database, is_too_large, unavailable_reason
from worker.serving.requests import spans
from worker.serving.requests.active_request import ActiveChoice, ActiveRequest, internal_error

log = logging.getLogger(__name__)

Publish = Callable[[Sequence[PartialEvent]], None]


class Sink:
    """Write the output of one worker."""

    def __init__(
        self, database: Database, publish: Publish, worker_id: str, lease_s: float, numerics: str | None = None
    ) -> None:
        """Write to `database` under leases of `lease_s` seconds, and pass events to `publish`.

        `numerics` is the fingerprint of the worker, noted in what it writes.
        """
        self._database = database
        self._publish = publish
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._numerics = numerics
        self._pending: list[tuple[ActiveRequest, RequestProgress]] = []  # not committed yet

    def started(self, request: ActiveRequest) -> None:
        """Publish the `started` events of a request."""
        self._publish([e for choice in request.choices.values() for e in self._started_event(request, choice)])

    def flush(self, requests: Sequence[ActiveRequest], now: float) -> FlushResult:
        """Commit new progress, renew every lease, publish. After DatabaseUnavailable nothing is lost: call again."""
        ended = {p.lease.key for _, p in self._pending if p.ends or p.failure is not None}
        self._pending += [(r, _progress(r, now)) for r in requests if r.claim.lease.key not in ended]
        held = [request.claim.lease for request in requests]
        started_at = time.time()
        result = self._write(0, len(self._pending), held)
        committed, self._pending = self._pending, []
        written = [entry for entry in committed if entry[1].lease.key not in result.lost]
        spans.record_commits(written, started_at, time.time())
        self._publish([*self._events(committed, result.lost), *job_events(result.ended_jobs)])
        for job_id, status in result.ended_jobs:
            log.info("Job %s is %s", job_id, status, extra={"action": "job_ended", "job_id": job_id})
        return result

    def copy_answers(self, identities: Collection[str], scope: CacheScope) -> Copied:
        """Answer some of the requests with these identities by copies, publish, and return what was done.

        Raises the errors of the database.
        """
        with self._database.write() as session:
            copied = cached_answers.copy_answers(session, identities, scope)
        events = [event for answer in copied.answers for event in _copy_events(answer)]
        self._publish([*events, *job_events(copied.ended_jobs)])
        for job_id, status in copied.ended_jobs:
            log.info("Job %s is %s", job_id, status, extra={"action": "job_ended", "job_id": job_id})
        return copied

    def _write(self, start: int, end: int, held: Sequence[Lease]) -> FlushResult:
        """Write the pending entries start..end-1 in one transaction; bisect them if the database rejects a value.

        The request with the rejected value fails; all others are written.
        """
        progress = [entry for _, entry in self._pending[start:end]]
        try:
            with self._database.write() as session:
                return writes.flush(session, self._worker_id, self._lease_s, progress, held, self._numerics)
        except Exception as error:
            if isinstance(error, DATABASE_UNAVAILABLE) and not is_too_large(error):
                raise DatabaseUnavailable(f"The database does not answer: {unavailable_reason(error)}") from error
            if not progress or (len(progress) == 1 and progress[0].failure is not None):
                raise  # no value of a request is the cause
            if len(progress) == 1:
                request = self._pending[start][0]
                _fail(request, "the database rejects a value of its output", error)
                self._pending[start] = (request, request.progress(0.0))
                return self._write(start, end, held)
        middle = (start + end) // 2
        first, second = self._write(start, middle, held), self._write(middle, end, held)
        ended_jobs, returned = first.ended_jobs + second.ended_jobs, first.returned | second.returned
        return FlushResult(first.lost | second.lost, ended_jobs, returned)

    def _started_event(self, request: ActiveRequest, choice: ActiveChoice) -> Iterator[PartialEvent]:
        if not choice.announced:
            choice.announced = True
            yield self._event(request, choice.index, choice.next_seq, type="started")
            choice.next_seq += 1

    def _events(
        self, committed: Sequence[tuple[ActiveRequest, RequestProgress]], lost: frozenset[RequestKey]
    ) -> Iterator[PartialEvent]:
        for request, progress in committed:
            if progress.lease.key in lost:
                log.warning(
                    "The lease of request %s is lost; its progress was dropped",
                    request.claim.custom_id,
                    extra={"action": "lease_lost", **_ids(progress.lease)},
                )
                continue
            try:
                yield from list(self._events_of(request, progress))
            except Exception:  # it is committed: clients read it from the database
                log.exception("Events can't be published", extra={"action": "events_failed", **_ids(progress.lease)})

    def _events_of(self, request: ActiveRequest, progress: RequestProgress) -> Iterator[PartialEvent]:
        yield from (self._tokens(request, checkpoint) for checkpoint in progress.checkpoints)
        yield from (self._finished(request, finished) for finished in progress.finished)
        if progress.failure is not None:
            _log_failure(progress.lease, progress.failure)
            error = error_of(progress.failure)
            yield self._event(request, 0, request.failure_seq, type="failed", error=error)

    def _tokens(self, request: ActiveRequest, checkpoint: Checkpoint) -> PartialEvent:
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

    def _finished(self, request: ActiveRequest, finished: FinishedChoice) -> PartialEvent:
        return self._event(
            request,
            finished.choice_index,
            finished.last_seq,
            type="finished",
            finish_reason=finished.finish_reason,
        )

    @staticmethod
    def _event(request: ActiveRequest, choice: int, seq: int, **fields: object) -> PartialEvent:
        lease = request.claim.lease
        identity = {"job_id": lease.job_id, "request": request.claim.custom_id, "index": lease.request_index}
        return PartialEvent.model_validate({**identity, "choice": choice, "seq": seq, **fields})


def _copy_events(answer: CopiedAnswer) -> Iterator[PartialEvent]:
    """Yield the events of a request that was answered by a copy: the whole text of each choice at once."""
    identity = {"job_id": answer.job_id, "request": answer.custom_id, "index": answer.request_index}
    for choice in answer.choices:
        pieces = ({"text": choice.text, "source": "target"},) if choice.text else ()
        parts: tuple[dict[str, Any], ...] = (
            {"type": "started"},
            {"type": "tokens", "text": choice.text, "pieces": pieces, "tokens": choice.completion_tokens},
            {"type": "finished", "finish_reason": choice.finish_reason},
        )
        for seq, fields in enumerate(parts):
            yield PartialEvent.model_validate({**identity, "choice": choice.choice_index, "seq": seq, **fields})


def _progress(request: ActiveRequest, now: float) -> RequestProgress:
    """Return what a flush writes for a request; if that raises, the failure of the request."""
    try:
        return request.progress(now)
    except Exception as error:
        _fail(request, "its progress could not be collected", error)
        return request.progress(now)


def _fail(request: ActiveRequest, what: str, error: Exception) -> None:
    log.error("Request %s failed: %s", request.claim.custom_id, what, exc_info=error, extra=_ids(request.claim.lease))
    request.fail(internal_error(what, error))


def _log_failure(lease: Lease, failure: RequestFailure) -> None:
    ids = _ids(lease)
    log.info(
        "A request failed: %s: %s", failure.code, storable(failure.message), extra={"action": "request_failed", **ids}
    )


def _ids(lease: Lease) -> dict[str, object]:
    return {"job_id": lease.job_id, "request_index": lease.request_index}
