"""The request loop: claim requests, pass their sequences to the engine, and write what it reports.

It owns all text and all SQL of requests. It renews leases only while the engine reports, so a hanging step loses them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable

from jobs.errors import DatabaseUnavailable, RequestRefused
from jobs.logs import log_context
from jobs.messages import MESSAGE_VERSION
from storage import leases
from storage.cached_answers import CacheScope, Repeats
from storage.fair_share import AGEING_REQUESTS, Ageing
from storage.records import Checkpoint, Claim, RequestFailure, RequestKey, RequestPlan
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult
from worker.serving.channel import Channel
from worker.serving.messages import (
    ActiveRequests,
    AddSequences,
    CancelSequences,
    EngineReport,
    HandBack,
    ReportsRead,
)
from worker.serving.requests import spans
from worker.serving.requests.active_request import ActiveChoice, ActiveRequest, internal_error
from worker.serving.requests.request_reader import ParsedRequest, RequestReader
from worker.serving.requests.sink import Sink
from worker.text.codec import Codec
from worker.text.output_stream import OutputStream
from worker.text.prompt_record import PromptRecord

log = logging.getLogger(__name__)

_POLL_S = 1.0  # between claims after one that found nothing; a notification ends the wait
_CLAIM_SHARE = 0.05  # max share of the time spent on claims while sequences are decoding
_INTERACTIVE_INTERVAL_S = 0.1  # between commits while an interactive request is active
_FREE_READS = 4  # requests being tokenized that use no slot: slow prompts must not block the claim of others
_SETTLE_S = 0.02  # wait of a busy engine for the short requests just claimed
_IDLE_SETTLE_S = 0.5  # wait of an idle engine for short requests, so that they start in one batch
_IDLE_POLL_S = 0.05  # wait of an idle engine for a long request, before it checks for other work
_READ_REPORTS = 16  # reports read before the engine is told
_STATUS_S = 0.5  # between two messages about its own status
_MAX_FRUITLESS = 20  # others copy at the same time, or the source is erased; more would be a bug
_RENEWAL_FENCE = 2 / 3  # share of a lease without renewal after which leases are renewed before anything is decoded


class RequestLoop:
    """Serve one model's requests with the engine at the other end of a channel."""

    def __init__(
        self,
        codec: Codec,
        sink: Sink,
        database: Database,
        channel: Channel,
        *,
        worker_id: str,
        model: str,
        lease_s: float,
        interval_s: float,
        reserved: int = 0,
        ageing_requests: int = AGEING_REQUESTS,
        cache_scope: CacheScope | None = None,
    ) -> None:
        """Flush every `interval_s`; `reserved` of the engine's slots are kept for interactive requests.

        A priority class gets a request after `ageing_requests` of others. Requests with an answer of the `cache_scope`
        get a copy of it; None: all are decoded.
        """
        self._codec = codec
        self._sink = sink
        self._database = database
        self._channel = channel
        self._worker_id = worker_id
        self._model = model
        self._lease_s = lease_s
        self._interval_s = interval_s
        self._reserved = reserved
        self._ageing = Ageing(ageing_requests)
        self._repeats = None if cache_scope is None else Repeats(cache_scope)
        self._fruitless = 0  # times in a row that no answer was copied, though a claim had found some
        self._readers = RequestReader(codec)
        self._active: dict[RequestKey, ActiveRequest] = {}
        self._choices: dict[int, tuple[ActiveRequest, ActiveChoice]] = {}  # that the engine decodes, by number
        self._ended: list[int] = []  # numbers that the engine must cancel
        self._num_added = 0  # sequences passed to the engine
        self._num_read = 0  # reports that the engine does not know to be read
        self._free_slots = 0  # of the engine, beside all sequences passed to it
        self._reported = False  # the engine has reported since the last flush
        self._may_claim = False  # it has reported since the last claim
        self._notified = False
        self._unread: deque[EngineReport] = deque()
        self._hand_back: HandBack | None = None
        self._told_at = float("-inf")
        self._claimed_at = float("-inf")
        self._claim_s = 0.0  # duration of the last claim
        self._more_waiting = False  # the last claim with slots for batch requests found some
        self._flushed_at = float("-inf")
        self._flush_failed = False  # nothing more is read until one succeeds
        self._renewed_at = float("-inf")  # when the oldest held lease was renewed

    @property
    def busy(self) -> bool:
        """True while requests are active, and while more may be waiting in the database."""
        return bool(self._active) or self._more_waiting

    @property
    def num_requests(self) -> int:
        """Number of requests that it holds."""
        return len(self._active)

    @property
    def hand_back_s(self) -> float | None:
        """Seconds that `hand_back` may take; None while the worker does not stop."""
        self._fetch()
        return None if self._hand_back is None else self._hand_back.timeout_s

    @property
    def wait_s(self) -> float:
        """Longest time to wait for a report between `admit` and `collect`."""
        now = time.monotonic()
        if self._claim_is_due(now, self._claim_slots()):
            return 0.0
        if any(request.reading for request in self._active.values()):
            return _IDLE_POLL_S
        due_at = [now + _POLL_S]
        if self._flushable():
            due_at.append(self._flushed_at + self._flush_interval_s())
        if self._free_slots > 0 and self._engine_answers:
            due_at.append(self._claimed_at + _POLL_S)
        return max(0.0, min(due_at) - now)

    def notify(self) -> None:
        """Claim in the next turn: new work may be waiting."""
        self._notified = True

    def admit(self) -> None:
        """Claim requests and pass their sequences to the engine. Raises DatabaseUnavailable: call again later."""
        overdue = time.monotonic() - self._renewed_at > _RENEWAL_FENCE * self._lease_s
        self._tell_status()
        if self._active and (self._flush_failed or (overdue and self._reported)):
            self._flush()  # after a pause, first find out which leases are lost
        self._read_reports()
        self._admit_read(_SETTLE_S if self._claim() else 0.0)
        self._cancel_ended()

    def collect(self) -> None:
        """Read what the engine has reported, and flush what is due. Raises DatabaseUnavailable: call again later."""
        self._read_reports()
        self._cancel_ended()
        if self._active and self._flush_is_due():
            self._flush()
            self._cancel_ended()

    def hand_back(self) -> None:
        """Commit all progress and release every request, so that another worker continues it."""
        self._read_reports()
        self._reported = True  # the engine has stopped in order
        if self._active:
            self._flush()
        try:
            with self._database.write() as session:
                leases.release(session, self._worker_id, [r.claim.lease for r in self._active.values()])
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error
        self._drop(set(self._active))
        self._cancel_ended()
        self._readers.close()

    def _claim(self) -> bool:
        """Claim requests if a claim is due, and start reading them; return whether there were any."""
        now = time.monotonic()
        free_slots, reserved = self._claim_slots()
        if not self._claim_is_due(now, (free_slots, reserved)):
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
                    ageing=self._ageing,
                    repeats=self._repeats,
                )
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error
        spans.record_claims(claims, time.time() - (time.monotonic() - now), time.time())
        if not self._active:
            self._renewed_at = now
        # Where there was work there may be more. A claim without slots for batch requests says nothing about them: keep
        # the flag, or the next free slot would stay empty until the next poll.
        found = bool(claims) or (self._repeats is not None and bool(self._repeats.answered))
        self._more_waiting = found or (self._more_waiting and free_slots <= reserved)
        self._notified = self._may_claim = False
        self._claimed_at = time.monotonic()
        self._claim_s = self._claimed_at - now
        for claim in claims:
            self._active[claim.lease.key] = ActiveRequest(claim, reading=True)
            self._readers.put(claim)
        if self._repeats is not None and self._repeats.answered:
            self._copy_answers(self._repeats)
        return bool(claims)

    def _copy_answers(self, repeats: Repeats) -> None:
        """Answer the requests whose answers the last claim has found."""
        try:
            copied = self._sink.copy_answers(repeats.answered, repeats.scope)
            self._fruitless = 0 if copied.answers else self._fruitless + 1
            while copied.more:
                copied = self._sink.copy_answers(repeats.answered, repeats.scope)
        except DATABASE_UNAVAILABLE as error:
            raise _unavailable(error) from error
        except Exception:  # they are decoded instead
            repeats.refused |= repeats.answered
            log.exception("Answers can't be copied", extra={"action": "copies_failed"})
        if self._fruitless >= _MAX_FRUITLESS:  # nothing may be left out for ever
            repeats.refused |= repeats.answered

    def _claim_slots(self) -> tuple[int, int]:
        """Return the slots that a claim may fill, and how many of them are kept for interactive requests."""
        unread = max(0, sum(request.reading for request in self._active.values()) - _FREE_READS)
        reserved = max(0, self._reserved - sum(request.slots for request in self._interactive()))
        return self._free_slots - unread, reserved

    @property
    def _engine_answers(self) -> bool:
        """False after a claim until the engine reports: one that hangs must get no more work."""
        return self._may_claim or not self._choices

    def _claim_is_due(self, now: float, slots: tuple[int, int]) -> bool:
        free_slots, reserved = slots
        if free_slots <= 0 or not self._engine_answers:
            return False
        since_s = now - self._claimed_at
        more = self._more_waiting and free_slots > reserved and self._claim_pays(since_s)
        return self._notified or more or since_s >= _POLL_S

    def _admit_read(self, settle_s: float) -> None:
        """Pass the requests that have been read to the engine; an idle engine waits for them."""
        idle = bool(self._active) and not self._choices
        sequences: list[Sequence] = []
        for claim, result in self._readers.take(_IDLE_SETTLE_S if idle else settle_s, _IDLE_POLL_S if idle else 0.0):
            request = self._active.get(claim.lease.key)
            if request is not None and request.claim is claim:  # else its lease was lost meanwhile
                with log_context(job_id=claim.lease.job_id, request_index=claim.lease.request_index):
                    sequences += self._admit(request, result)
        if sequences:
            self._channel.send(AddSequences(tuple(sequences)))
            self._num_added += len(sequences)
            self._free_slots -= len(sequences)

    def _claim_pays(self, since_s: float) -> bool:
        """Return whether a claim is worth its time: active sequences wait for it."""
        return not self._choices or since_s >= self._claim_s / _CLAIM_SHARE

    def _admit(self, request: ActiveRequest, result: ParsedRequest | BaseException) -> list[Sequence]:
        """Return the sequences of a request; none if it ends with an error."""
        request.reading = False
        try:
            if isinstance(result, BaseException):
                raise result
            sequences = self._add_choices(request, result)
            self._sink.started(request)
            self._choices |= {choice.number: (request, choice) for choice in request.choices.values()}
            return sequences
        except RequestRefused as refused:
            code, status = refused.code or "invalid_value", refused.status_code
            self._end(request, RequestFailure(code, refused.message, refused.param, status))
        except BaseException as error:  # any error here is the failure of this request
            self._fail(request, "it could not be started", error)
        return []

    def _add_choices(self, request: ActiveRequest, reading: ParsedRequest) -> list[Sequence]:
        claim, body, prompts = request.claim, reading.request, reading.prompts
        earlier: defaultdict[int, list[Checkpoint]] = defaultdict(list)
        for checkpoint in claim.checkpoints:
            earlier[checkpoint.choice_index].append(checkpoint)
        form = reading.answer_format
        if not claim.begun:
            stored = None if form is None else form.model_dump(mode="json")
            plan = RequestPlan(stored, reading.sampling_defaults)
            request.unwritten_plan = None if plan == claim.plan else plan
        bound = reading.grammar if body.bound else None
        sequences: list[Sequence] = []
        n = body.sampling.n
        for index in sorted(set(range(len(prompts) * n)) - set(claim.finished_choices)):
            number, prompt, first = index // n, prompts[index // n], index % n == 0
            record = PromptRecord(self._codec, body, claim.endpoint, number, prompt, first=first)
            sequence = self._codec.sequence((*claim.lease.key, index), prompt, body.sampling, index, reading.grammar)
            sequence.prompt_top, sequence.drafts = record.top, not claim.verifies
            choice = ActiveChoice(
                index=index,
                number=sequence.number,
                num_prompt=len(prompt),
                output_stream=OutputStream(
                    sequence.key,
                    self._codec.stream(body.sampling, prompt, claim.endpoint, form, bound),
                    record.echo,
                ),
                prompt=record,
                started_at=claim.started_at or time.time(),
                first_of_prompt=first,
                wants_logprobs=body.sampling.logprobs is not None,
                measured=not claim.verifies,
            )
            choice.resume(earlier[index], sequence)
            request.choices[index] = choice
            sequences.append(sequence)
        request.numbers = frozenset(sequence.number for sequence in sequences)
        return sequences

    def _fetch(self) -> None:
        """Take messages from the channel, without reading them: the engine is held back while the database is away."""
        for message in self._channel.receive():
            if isinstance(message, HandBack):
                self._hand_back = message
            else:
                self._unread.append(message)

    def _tell_status(self) -> None:
        now = time.monotonic()
        if now - self._told_at >= _STATUS_S:
            self._channel.send(ActiveRequests(self.num_requests))
            self._told_at = now

    def _read_reports(self) -> None:
        self._fetch()
        while self._unread:
            report = self._unread.popleft()
            self._reported = self._may_claim = True
            self._notified |= report.notified
            self._num_read += 1
            self._free_slots = report.free_capacity - (self._num_added - report.num_added)
            for result in report.results or ():
                self._take(result, report.ended_at)
            for number, reason in report.given_up:
                self._refuse(number, reason)
        if self._num_read >= _READ_REPORTS:
            self._channel.send(ReportsRead(self._num_read))
            self._num_read = 0

    def _take(self, result: StepResult, ended_at: float) -> None:
        request, choice = self._choices.get(result.number, (None, None))
        if request is None or choice is None:  # the engine did not know yet that it had ended
            return
        if result.finish_reason is not None:
            del self._choices[result.number]
        try:
            choice.take(result, ended_at, self._codec.token_text)
        except BaseException as error:  # an error in its text must not stop other requests
            self._fail(request, "its text could not be written", error)
            return
        if choice.output_stream.finished:  # maybe by a stop string, which the engine does not know
            self._forget([result.number])

    def _refuse(self, number: int, reason: str) -> None:
        """End a request with an error because the engine can't decode this choice, even alone."""
        request, _ = self._choices.pop(number, (None, None))
        if request is not None:
            message = reason or "decoding failed on this request, and on it alone"
            self._end(request, RequestFailure("engine_error", message, status_code=500))

    def _fail(self, request: ActiveRequest, what: str, error: BaseException) -> None:
        """End a request with an unexpected error, and log its traceback."""
        extra = {"action": "request_failed", "job_id": request.claim.lease.job_id}
        log.error("Request %s failed: %s", request.claim.custom_id, what, exc_info=error, extra=extra)
        self._end(request, internal_error(what, error))

    def _end(self, request: ActiveRequest, failure: RequestFailure) -> None:
        request.fail(failure)
        self._forget(request.numbers)

    def _forget(self, numbers: Iterable[int]) -> None:
        """Take no more results of these sequences; the engine must cancel those that it still decodes."""
        self._ended += [number for number in numbers if self._choices.pop(number, None) is not None]

    def _cancel_ended(self) -> None:
        if self._ended:
            self._channel.send(CancelSequences(tuple(self._ended)))
            self._ended = []

    def _flush_is_due(self) -> bool:
        if not self._flushable():
            return False
        if all(request.done for request in self._active.values()):
            return True
        done = any(request.done for request in self._interactive())
        return done or time.monotonic() - self._flushed_at >= self._flush_interval_s()

    def _flush_interval_s(self) -> float:
        return min(self._interval_s, _INTERACTIVE_INTERVAL_S) if self._interactive() else self._interval_s

    def _interactive(self) -> list[ActiveRequest]:
        return [request for request in self._active.values() if request.claim.priority]

    def _flushable(self) -> list[ActiveRequest]:
        """Return the requests that a flush may write. It renews their leases, so the engine must have reported."""
        return [request for request in self._active.values() if self._reported or request.failure is not None]

    def _flush(self) -> None:
        now, reported = time.monotonic(), self._reported
        self._flush_failed = True
        result = self._sink.flush(self._flushable(), time.time())
        self._flush_failed = self._reported = False
        self._renewed_at = now if reported else self._renewed_at
        self._flushed_at = time.monotonic()
        ended = {key for key, request in self._active.items() if request.ended}
        # The last claim found no more of a job that ran as many requests as it may: it may run another one now.
        self._notified |= any(self._active[key].claim.max_concurrent is not None for key in ended)
        gone = ended | result.lost | result.returned
        self._notified |= any(self._is_awaited(self._active[key].claim) for key in gone if key in self._active)
        self._drop(gone)

    def _is_awaited(self, claim: Claim) -> bool:
        """Return whether the last claim has left out requests that wait for the answer of this one."""
        return self._repeats is not None and claim.identity in self._repeats.waiting

    def _drop(self, keys: set[RequestKey]) -> None:
        for request in [self._active.pop(key) for key in keys if key in self._active]:
            self._forget(request.numbers)


def _unavailable(error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"The database does not answer: {unavailable_reason(error)}")
