"""Create jobs: validate a submission, store it in one transaction, and notify the workers.

The API server and the ingest process share this module. An invalid request fails alone; an invalid job raises
JobRefused.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from jobs.errors import (
    BasicError,
    DuplicateCustomId,
    EmptyJob,
    IdempotencyConflict,
    InvalidValue,
    LimitReached,
    MissingParameter,
    NotRetryable,
    QueueFull,
    ServiceUnavailable,
    TooManyRequests,
)
from jobs.messages import (
    CHAT_ENDPOINT,
    COMPLETIONS_ENDPOINT,
    MAX_COMPARED_REQUESTS,
    MESSAGE_VERSION,
    RESPONSES_ENDPOINT,
    Endpoint,
    GenerationRequest,
    JobStatus,
)
from jobs.openai.paths import endpoint_of_line
from jobs.producer import Notify
from jobs.settings import JobsSettings
from jobs.submission.custom_ids import CustomIds
from jobs.submission.items import Item
from jobs.submission.managed.fields import NOTHING_MANAGED, Managed
from jobs.submission.managed.pilot import PilotSize, check_pilot
from jobs.submission.models import ModelNames, known_models
from jobs.submission.parameters.grammar import read_grammar
from jobs.submission.parameters.identity import cache_default
from jobs.submission.parameters.sampling import parameter_fields, parse_parameters
from jobs.submission.request_buffer import RequestBuffer
from jobs.submission.request_parser import Rules, given_id, max_total_tokens, parse_body, parse_item
from jobs.submission.responses_api.chat_form import as_given
from jobs.submission.responses_api.stored_history import StoredHistory
from jobs.tracing import span
from storage import keys, queries, writes
from storage.keys import QuotaExceeded
from storage.pilots import draw_pilot
from storage.queries import JobView
from storage.records import NewJob, NewRequest, RequestFailure
from storage.session import Database

MAX_IDEMPOTENCY_KEY_CHARS = 255

_QUEUE_RETRY_S = 30.0  # Retry-After of a full queue; a guess


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as the caller submits it, not validated yet."""

    items: Iterable[Item]
    model: str | None = None  # None: the first request's, else the target of this installation
    endpoint: Endpoint | None = CHAT_ENDPOINT  # None: that of the first line of a batch file, else chat
    parameters: Mapping[str, Any] = field(default_factory=dict)  # defaults for its requests
    metadata: Any = None
    pilot: Any = None  # requests that run first, before the job pauses: a number, or True for a hundredth
    managed: Managed = NOTHING_MANAGED  # name, labels, priority, concurrency limit
    window_s: float | None = None
    traceparent: str | None = None
    compare_plain: Any = None  # number of requests to decode again without drafts, to measure the speed-up
    source_file_id: str | None = None  # uploaded file that the items are read from
    job_id: str | None = None
    api_key_id: str | None = None
    idempotency_key: str | None = None
    body_sha256: str | None = None


def create_job(submission: Submission, *, database: Database, notify: Notify, settings: JobsSettings) -> str:
    """Validate and store a job in one transaction, notify the workers, and return its id.

    Return the id of the earlier job if the idempotency key was used before. Raise JobRefused for an invalid job, and
    LimitReached if the queue or the key is at its limit.
    """
    rules, items = open_submission(submission, database, settings)
    with span("ingest", submission.traceparent, job_id=rules.job_id) as traceparent, RequestBuffer() as buffer:
        job = replace(new_job(submission, rules, settings), traceparent=traceparent)
        ids = parse_all(items, rules, settings.max_requests, buffer)
        depth = _queue_depth(database)
        fits = depth.reserve(len(buffer), settings.max_requests_queued)
        max_queued = None if fits else settings.max_requests_queued
        pilot = check_pilot(submission.pilot)
        recorded = _store(job, _with_ids(buffer.requests(), ids), database, max_queued, depth, pilot)
    if recorded.conflict:
        raise IdempotencyConflict
    if recorded.created:
        notify(recorded.job_id, rules.model)
    return recorded.job_id


def open_submission(submission: Submission, database: Database, settings: JobsSettings) -> tuple[Rules, Iterator[Item]]:
    """Return the rules of a job and all its items; raise JobRefused without items, or for an unknown model."""
    items = iter(submission.items)
    models = known_models(database, settings)
    head, model = _find_model(items, submission.model, models, settings.max_requests)
    if not head:
        raise EmptyJob
    rules = _rules(submission, model, endpoint_of_line(head[-1].value), models, database, settings)
    return rules, chain(_drain(head), items)


def retry_job(
    job: JobView,
    *,
    api_key_id: str | None,
    idempotency_key: str | None,
    database: Database,
    notify: Notify,
    settings: JobsSettings,
) -> str:
    """Store a new job with the unsuccessful requests of an ended job, and return its id.

    The ended job does not change. The new job has its model, endpoint, name, labels, priority, concurrency limit and
    window, and the requests keep their custom ids, bodies and seeds.
    """
    if not JobStatus(job.status).final:
        raise NotRetryable(f"The job is {job.status}. Wait until it has ended, or cancel it.")
    models = known_models(database, settings)
    context_tokens = models.context_tokens(models.resolve(job.model))
    again = NewJob(
        id=new_job_id(),
        model=job.model,
        endpoint=job.endpoint,
        window_s=job.expires_at - job.created_at,
        metadata=job.metadata,
        name=job.name,
        priority_class=job.priority_class,
        max_concurrent=job.max_concurrent,
        api_key_id=api_key_id,
        idempotency_key=check_idempotency_key(idempotency_key),
        body_sha256=hashlib.sha256(f"retry of {job.id}".encode()).hexdigest(),
        retry_of=job.id,
        body_version=MESSAGE_VERSION,
    )

    def unsuccessful(session: Session) -> Iterator[NewRequest]:
        return (_with_tokens(request, context_tokens) for request in queries.requests_to_retry(session, job.id))

    none_left = NotRetryable(_PROMPTS_DELETED if job.prompts_deleted_at is not None else None)
    return store_copies(again, unsuccessful, none_left, database=database, notify=notify, settings=settings)


_PROMPTS_DELETED = "The prompts of this job were deleted because of their age. Submit them again as a new job."


def store_copies(
    job: NewJob,
    copies: Callable[[Session], Iterator[NewRequest]],
    none_left: BasicError,
    *,
    database: Database,
    notify: Notify,
    settings: JobsSettings,
) -> str:
    """Store a job with copies of another job's requests, and return its id; raise `none_left` if there are none.

    `copies` reads them in the transaction that stores the job.
    """
    try:
        with span("ingest", job_id=job.id) as traceparent, database.write() as session:
            requests = copies(session)
            first = next(requests, None)
            if first is None:
                raise none_left
            recorded = writes.insert_job(session, replace(job, traceparent=traceparent), chain([first], requests))
            if recorded.created:
                check_queue_limit(session, settings.max_requests_queued)
    except QuotaExceeded as exceeded:
        raise quota_error(exceeded) from exceeded
    if recorded.conflict:
        raise IdempotencyConflict
    if recorded.created:
        notify(recorded.job_id, job.model)
    return recorded.job_id


def _with_tokens(request: NewRequest, context_tokens: int | None) -> NewRequest:
    """Return a stored request with its maximum number of tokens."""
    return replace(request, tokens=max_total_tokens(GenerationRequest.model_validate(request.body), context_tokens))


def create_interactive_job(
    submission: Submission, *, database: Database, notify: Notify, settings: JobsSettings, waits: bool = True
) -> str:
    """Store a job of one interactive request, whose caller waits for the result, and return its id.

    Raise RequestRefused for an invalid request, and ServiceUnavailable if no worker serves the model. A request whose
    caller does not wait has the priority of a batch, and may wait for a worker.
    """
    (item,) = submission.items
    if item.model is None:
        raise MissingParameter("The field model is required.", param="model")
    asked = submission.model or item.model
    rules = _rules(submission, asked, None, known_models(database, settings), database, settings)
    request = parse_body(item.value, rules)
    if waits and rules.context_tokens is None:
        raise ServiceUnavailable(f"No worker serves {rules.model} right now; try again in a few seconds.")
    with span("ingest", submission.traceparent, job_id=rules.job_id) as traceparent:
        job = replace(new_job(submission, rules, settings), priority=int(waits), traceparent=traceparent)
        _store(job, [request], database, None if waits else settings.max_requests_queued)
    notify(job.id, job.model)
    return job.id


def create_failed_job(
    submission: Submission, failure: RequestFailure, *, database: Database, settings: JobsSettings
) -> str:
    """Store a failed job for a rejected submission; its only request has the error, for callers that follow the job."""
    job_id = submission.job_id or new_job_id()
    job = NewJob(
        id=job_id,
        model=submission.model or settings.default_model,
        endpoint=submission.endpoint or CHAT_ENDPOINT,
        window_s=settings.completion_window_s,
        api_key_id=submission.api_key_id,
        idempotency_key=submission.idempotency_key,
        body_sha256=submission.body_sha256,
    )
    return _store(job, [NewRequest("batch", failure=failure)], database).job_id


_CALL_PREFIXES: Mapping[Endpoint, str] = {
    CHAT_ENDPOINT: "chatcmpl-",
    COMPLETIONS_ENDPOINT: "cmpl-",
    RESPONSES_ENDPOINT: "resp_",
}


def new_job_id() -> str:
    """Return a new random job id, which other callers can't guess."""
    return f"batch_{secrets.token_hex(16)}"


def new_call_id(endpoint: Endpoint) -> str:
    """Return a new id of an interactive request, used for both the job and the answer."""
    return f"{_CALL_PREFIXES[endpoint]}{secrets.token_hex(16)}"


def _drain(items: deque[Item]) -> Iterator[Item]:
    """Yield items without keeping references: a single item may be very large."""
    while items:
        yield items.popleft()


def _find_model(items: Iterator[Item], model: Any, models: ModelNames, limit: int) -> tuple[deque[Item], Any]:
    """Return the items read so far, and the model: the job's, or that of the first readable item with a known model.

    Skip items that are unreadable or name an unknown model: they fail alone and don't choose the job's model.
    """
    head: deque[Item] = deque()
    unknown: Any = None
    for item in items:
        if model is not None or (item.is_readable and (item.model is None or models.find(item.model))):
            head.append(item)
            return head, item.model if model is None else model
        unknown = item.model if unknown is None else unknown
        head.append(_without_text(item))
        if len(head) > limit:
            break
    return head, unknown


def _without_text(item: Item) -> Item:
    """Return an item with an unknown model, reduced to its id, to save memory: there may be many."""
    if not item.is_readable:
        return item
    given = given_id(item)
    if given is None or not given.is_own:
        return replace(item, value={"model": False}, recovered_id=None if given is None else given.text)
    return replace(item, value={"model": False, "custom_id": given.text})


def _with_ids(requests: Iterable[NewRequest], ids: Mapping[int, str]) -> Iterator[NewRequest]:
    """Yield the requests, with their custom ids replaced by those in `ids`."""
    for index, request in enumerate(requests):
        yield replace(request, custom_id=ids[index]) if index in ids else request


class RequestSink(Protocol):
    """Takes the requests of a job, in order, and counts them."""

    def __len__(self) -> int:
        """Return the number of requests."""

    def add(self, request: NewRequest) -> None:
        """Take the next request."""


def parse_all(items: Iterable[Item], rules: Rules, limit: int, buffer: RequestSink) -> Mapping[int, str]:
    """Parse all items into the buffer; return generated ids, by index, for requests without a valid one."""
    ids = CustomIds()
    for item in items:
        if len(buffer) == limit:
            raise TooManyRequests(f"A job may have at most {limit} requests. Split the file into several jobs.")
        request = parse_item(item, rules)
        earlier = ids.add(item.index, item.location, given_id(item))
        if earlier is not None:
            message = f"{earlier} and {item.location} have the same custom_id {request.custom_id!r}."
            raise DuplicateCustomId(message, param="custom_id", line=item.line)
        buffer.add(request)
        del item, request  # before the next one is read
    return ids.generated()


def _rules(
    submission: Submission,
    asked: Any,
    named: Endpoint | None,
    models: ModelNames,
    database: Database,
    settings: JobsSettings,
) -> Rules:
    """Return the rules of a job. Its endpoint is that of the submission, else `named`, else the chat endpoint."""
    model = models.default if asked is None else models.resolve(asked)
    endpoint = submission.endpoint or named or CHAT_ENDPOINT
    with as_given(submission.parameters, endpoint):
        given = parameter_fields(submission.parameters, endpoint)
        defaults, grammar = parse_parameters(given, endpoint), read_grammar(given, endpoint)
    return Rules(
        job_id=submission.job_id or new_job_id(),
        model=model,
        endpoint=endpoint,
        defaults=defaults,
        grammar=grammar,
        max_prompt_chars=settings.max_prompt_chars,
        context_tokens=models.context_tokens(model),
        models=models,
        history=StoredHistory(database, submission.api_key_id or None),
        owner=submission.api_key_id or "",
        cache=cache_default(database, settings, submission.api_key_id),
    )


def new_job(submission: Submission, rules: Rules, settings: JobsSettings) -> NewJob:
    """Return the job of a submission; raise InvalidValue for its fields."""
    return NewJob(
        id=rules.job_id,
        model=rules.model,
        endpoint=rules.endpoint,
        window_s=submission.window_s or settings.completion_window_s,
        **submission.managed.columns(submission.metadata),
        api_key_id=submission.api_key_id,
        idempotency_key=check_idempotency_key(submission.idempotency_key),
        body_sha256=submission.body_sha256,
        body_version=MESSAGE_VERSION,
        compare_plain=check_compare_plain(submission.compare_plain),
        source_file_id=submission.source_file_id,
    )


def _store(
    job: NewJob,
    requests: Iterable[NewRequest],
    database: Database,
    max_queued: int | None = None,
    depth: QueueDepth | None = None,
    pilot: PilotSize | None = None,
) -> writes.InsertedJob:
    """Store a job; raise LimitReached beyond a limit of its key, or beyond `max_queued` requests of all callers."""
    try:
        with database.write() as session:
            recorded = writes.insert_job(session, job, requests)
            if recorded.created and pilot is not None:
                draw_pilot(session, recorded.job_id, pilot.requests, pilot.seed)
            if recorded.created and max_queued is not None:
                counted = check_queue_limit(session, max_queued)
                if depth is not None:
                    depth.update(counted)
            return recorded
    except QuotaExceeded as exceeded:
        raise quota_error(exceeded) from exceeded


class QueueDepth:
    """Estimate of the number of queued requests, because counting is slow with many open jobs.

    A count is valid for _COUNT_VALID_S, plus what this process adds, and only up to half of the limit. Above that,
    every job counts the requests.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._requests = 0
        self._counted_at = float("-inf")

    def reserve(self, requests: int, max_queued: int) -> bool:
        """Add requests and return True if they certainly fit; return False if they must be counted."""
        with self._lock:
            fresh = self._now() - self._counted_at < _COUNT_VALID_S
            if not fresh or self._requests + requests > max_queued / 2:
                return False
            self._requests += requests
            return True

    def update(self, requests: int) -> None:
        """Set the number of queued requests to a new count."""
        with self._lock:
            self._requests, self._counted_at = requests, self._now()


_COUNT_VALID_S = 1.0
_depth_by_engine: WeakKeyDictionary[Engine, QueueDepth] = WeakKeyDictionary()


def _queue_depth(database: Database) -> QueueDepth:
    return _depth_by_engine.setdefault(database.engine, QueueDepth())


def check_queue_limit(session: Session, max_queued: int, more: int = 0) -> int:
    """Return the queued requests and `more`; raise QueueFull, which rolls back the transaction, above `max_queued`.

    Call this after the job is stored, so that a repeated submission, which adds no requests, is not rejected.
    """
    depth = keys.open_work(session).requests + more
    if depth > max_queued:
        raise QueueFull(
            f"The queue would have {depth} requests with this job; the limit is {max_queued}.",
            retry_after_s=_QUEUE_RETRY_S,
        )
    return depth


def quota_error(exceeded: QuotaExceeded) -> LimitReached:
    """Return the error for a job beyond a limit of its key."""
    return LimitReached(
        f"This key may have {exceeded.limit} {exceeded.what} in the queue; with this job it would have "
        f"{exceeded.asked}.",
        retry_after_s=_QUEUE_RETRY_S,
    )


def check_idempotency_key(key: str | None) -> str | None:
    """Return the idempotency key; raise InvalidValue if it is empty or too long."""
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidValue(f"must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters", param="Idempotency-Key")
    return key


def check_compare_plain(count: Any) -> int:
    """Return the number of requests to compare; raise InvalidValue if it is out of range."""
    if count is None:
        return 0
    if type(count) is not int or not 1 <= count <= MAX_COMPARED_REQUESTS:
        raise InvalidValue(f"must be a whole number from 1 to {MAX_COMPARED_REQUESTS}", param="compare_plain")
    return count
