"""The worker loop: claim requests, step the engine, pass the results to the sink.

`Runner.run_once` is one iteration. Celery, signals and threads are the business of `worker.serving.service`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from jobs.errors import DatabaseUnavailable, RequestRefused
from jobs.logs import log_context
from jobs.messages import MESSAGE_VERSION
from storage import leases
from storage.records import Checkpoint, RequestFailure, RequestKey
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from worker.engine.engine import Engine
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult
from worker.serving import spans
from worker.serving.active_request import ActiveChoice, ActiveRequest, internal_error
from worker.serving.request_reader import ParsedRequest, RequestReader
from worker.serving.resilient_engine import ResilientEngine
from worker.serving.sink import Sink
from worker.serving.speedup_check import SpeedupCheck
from worker.serving.worker_stats import WorkerStats
from worker.text.codec import Codec
from worker.text.output_stream import OutputStream

log = logging.getLogger(__name__)

_POLL_S = 1.0  # between claims after one that found nothing; a notification ends the wait
_CLAIM_SHARE = 0.05  # max share of the time spent on claims while sequences are decoding
_INTERACTIVE_INTERVAL_S = 0.1  # between commits while an interactive request is active
_FREE_READS = 4  # requests being tokenized that use no slot: slow prompts must not block the claim of others
_SETTLE_S = 0.02  # wait of a busy engine for the short requests just claimed
_IDLE_SETTLE_S = 0.5  # wait of an idle engine for short requests, so that they start in one batch
_IDLE_POLL_S = 0.05  # wait of an idle engine for a long request, before it checks for other work
_RENEWAL_FENCE = 2 / 3  # share of a lease without renewal after which leases are renewed before anything is decoded


class Runner:
    """Serve one model's requests with one engine."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        codec: Codec,
        sink: Sink,
        database: Database,
        *,
        worker_id: str,
        model: str,
        lease_s: float,
        interval_s: float,
        reserved: int = 0,
    ) -> None:
        """Flush every `interval_s`; `make_engine` is called again after a failed step.

        `reserved` of the engine's slots are kept for interactive requests.
        """
        self._engine = ResilientEngine(make_engine)
        self._codec = codec
        self._sink = sink
        self._database = database
        self._worker_id = worker_id
        self._model = model
        self._lease_s = lease_s
        self._interval_s = interval_s
        self._reserved = reserved
        self._readers = RequestReader(codec)
        self._speedup_check = SpeedupCheck(
            self._engine, codec, database, worker_id=worker_id, model=model, lease_s=lease_s
        )
        self._active: dict[RequestKey, ActiveRequest] = {}
        self._stats = WorkerStats()
        self._claimed_at = float("-inf")
        self._claim_s = 0.0  # duration of the last claim
        self._more_waiting = False  # the last claim with slots for batch requests found some
        self._flushed_at = float("-inf")
        self._renewed_at = float("-inf")  # when the oldest held lease was renewed
        self._warned_slow = False

    @property
    def busy(self) -> bool:
        """True while requests are active or compared, and while more may be waiting in the database."""
        return bool(self._active) or self._more_waiting or self._speedup_check.busy

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._engine.learned

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the start and what the worker holds now, as JSON."""
        return self._stats.as_json(self._active.values())

    def run_once(self, *, notified: bool = False) -> None:
        """Claim requests, run one step, flush what is due. Raises DatabaseUnavailable: call again later."""
        if self._active and time.monotonic() - self._renewed_at > _RENEWAL_FENCE * self._lease_s:
            self._flush()  # after a pause, first find out which leases are lost
        self._admit_read(_SETTLE_S if self._claim(notified) else 0.0)
        if self._active and self._engine.busy:
            self._step()
        if self._active and self._flush_is_due():
            self._flush()
        if not self._active:
            self._check_speedup()

    def hand_back(self) -> None:
        """Commit all progress and release every request, so that another worker continues it."""
        self._speedup_check.preempt()
        if self._active:
            self._flush()
        try:
            with self._database.write() as session:
                leases.release(session, self._worker_id, [r.claim.lease for r in self._active.values()])
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error
        self._drop(set(self._active))
        self._readers.close()

    def _claim(self, notified: bool) -> bool:
        """Claim requests if a claim is due, and start reading them; return whether there were any."""
        now, free_slots = time.monotonic(), self._speedup_check.free_capacity
        free_slots -= max(0, sum(request.reading for request in self._active.values()) - _FREE_READS)
        reserved = max(0, self._reserved - sum(request.slots for request in self._interactive()))
        since_s = now - self._claimed_at
        more = self._more_waiting and free_slots > reserved and self._claim_pays(since_s)
        if free_slots <= 0 or not (notified or more or since_s >= _POLL_S):
            return False
        try:
            with self._database.write() as session:
                claims = leases.claim(
                    session,
                    self._worker_id,
                    self._model,
                    free_slots,
                    self._lease_s,
                    holding=self._active,
                    reserved=reserved,
                    body_version=MESSAGE_VERSION,
                )
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error
        spans.record_claims(claims, time.time() - (time.monotonic() - now), time.time())
        if not self._active:
            self._renewed_at = now
        # Where there was work there may be more. A claim without slots for batch requests says nothing about them: keep
        # the flag, or the next free slot would stay empty until the next poll.
        self._more_waiting = bool(claims) or (self._more_waiting and free_slots <= reserved)
        self._claimed_at = time.monotonic()
        self._claim_s = self._claimed_at - now
        if claims:
            self._speedup_check.preempt()
        for claim in claims:
            self._active[claim.lease.key] = ActiveRequest(claim, reading=True)
            self._readers.put(claim)
        return bool(claims)

    def _admit_read(self, settle_s: float) -> None:
        """Add the requests that have been read to the engine; an idle engine waits for them."""
        idle = bool(self._active) and not self._engine.busy
        for claim, result in self._readers.take(_IDLE_SETTLE_S if idle else settle_s, _IDLE_POLL_S if idle else 0.0):
            request = self._active.get(claim.lease.key)
            if request is not None and request.claim is claim:  # else its lease was lost meanwhile
                with log_context(job_id=claim.lease.job_id, request_index=claim.lease.request_index):
                    self._admit(request, result)

    def _check_speedup(self) -> None:
        try:
            self._speedup_check.run_once()
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error

    def _claim_pays(self, since_s: float) -> bool:
        """Return whether a claim is worth its time: active sequences wait for it."""
        return not self._engine.busy or since_s >= self._claim_s / _CLAIM_SHARE

    def _admit(self, request: ActiveRequest, result: ParsedRequest | BaseException) -> None:
        request.reading = False
        try:
            if isinstance(result, BaseException):
                raise result
            self._add_choices(request, result)
            self._sink.started(request)
        except RequestRefused as refused:
            code, status = refused.code or "invalid_value", refused.status_code
            self._end(request, RequestFailure(code, refused.message, refused.param, status))
        except BaseException as error:  # any error here is the failure of this request
            self._fail(request, "it could not be started", error)

    def _add_choices(self, request: ActiveRequest, reading: ParsedRequest) -> None:
        claim, body, prompts = request.claim, reading.request, reading.prompts
        earlier: defaultdict[int, list[Checkpoint]] = defaultdict(list)
        for checkpoint in claim.checkpoints:
            earlier[checkpoint.choice_index].append(checkpoint)
        n = body.sampling.n
        for index in sorted(set(range(len(prompts) * n)) - set(claim.finished_choices)):
            prompt = prompts[index // n]
            sequence = self._codec.sequence((*claim.lease.key, index), prompt, body.sampling, index)
            started_at = claim.started_at or time.time()
            output_stream = OutputStream(sequence, self._codec.stream(body.sampling.stop, prompt, claim.endpoint))
            choice = ActiveChoice(index, output_stream, started_at, first_of_prompt=index % n == 0)
            choice.resume(earlier[index])
            request.choices[index] = choice
        request.keys = frozenset(choice.sequence.key for choice in request.choices.values())
        for choice in request.choices.values():
            self._engine.add(choice.sequence)

    def _step(self) -> None:
        began_at = time.monotonic()
        results, given_up = self._engine.step()
        self._warn_of_slow_steps(time.monotonic() - began_at)
        now = time.time()
        self._stats.take(results)
        for result in results:
            self._take(result, now)
        # The engine knows token ids only: cancel the sequences that a stop string has ended.
        self._engine.cancel({result.sequence.key for result in results if result.sequence.finished})
        for sequence in given_up:
            self._refuse(sequence)

    def _warn_of_slow_steps(self, step_s: float) -> None:
        if step_s > self._lease_s / 2 and not self._warned_slow:
            self._warned_slow = True
            log.warning(
                "A step took %.1f s and leases last %.0f s; a step longer than a lease loses this worker its requests. "
                "Raise BASIC_LEASE_S",
                step_s,
                self._lease_s,
                extra={"action": "slow_step"},
            )

    def _take(self, result: StepResult, now: float) -> None:
        job_id, request_index, index = _split_key(result.sequence.key)
        request = self._active[job_id, request_index]
        choice = request.choices.get(index)
        if choice is None:  # another choice of the request has failed in this step
            return
        try:
            choice.take(result, now, self._codec.token_text)
        except BaseException as error:  # an error in its text must not stop other requests
            self._fail(request, "its text could not be written", error)

    def _refuse(self, sequence: Sequence) -> None:
        """End a request with an error because the engine can't decode this choice, even alone."""
        job_id, request_index, _ = _split_key(sequence.key)
        message = sequence.failure or "decoding failed on this request, and on it alone"
        self._end(self._active[job_id, request_index], RequestFailure("engine_error", message, status_code=500))

    def _fail(self, request: ActiveRequest, what: str, error: BaseException) -> None:
        """End a request with an unexpected error, and log its traceback."""
        extra = {"action": "request_failed", "job_id": request.claim.lease.job_id}
        log.error("Request %s failed: %s", request.claim.custom_id, what, exc_info=error, extra=extra)
        self._end(request, internal_error(what, error))

    def _end(self, request: ActiveRequest, failure: RequestFailure) -> None:
        request.fail(failure)
        self._engine.cancel(set(request.keys))

    def _flush_is_due(self) -> bool:
        if all(request.done for request in self._active.values()):
            return True
        interactive = self._interactive()
        interval_s = min(self._interval_s, _INTERACTIVE_INTERVAL_S) if interactive else self._interval_s
        done = any(request.done for request in interactive)
        return done or time.monotonic() - self._flushed_at >= interval_s

    def _interactive(self) -> list[ActiveRequest]:
        return [request for request in self._active.values() if request.claim.priority]

    def _flush(self) -> None:
        now = time.monotonic()
        result = self._sink.flush(list(self._active.values()), time.time())
        self._renewed_at = now
        self._flushed_at = time.monotonic()
        ended = {key for key, request in self._active.items() if request.ended}
        self._drop(ended | set(result.lost))

    def _drop(self, keys: set[RequestKey]) -> None:
        gone = [self._active.pop(key) for key in keys if key in self._active]
        sequences: set[Hashable] = {key for request in gone for key in request.keys}
        if sequences:
            self._engine.cancel(sequences)


def _unavailable(error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"The database does not answer: {unavailable_reason(error)}")


def _split_key(key: Hashable) -> tuple[str, int, int]:
    assert isinstance(key, tuple)
    job_id, request_index, choice = key
    return str(job_id), int(request_index), int(choice)
