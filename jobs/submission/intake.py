"""The one door behind both entrances: a submission is checked, recorded in one transaction, and its doorbell notified.

Knows no HTTP and no Celery: it is handed a `notify` to call. What is wrong with one request fails that request; what is
wrong with the job as a whole raises JobRefused.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from jobs.errors import (
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
    UnknownModel,
)
from jobs.messages import (
    CHAT_ENDPOINT,
    MAX_COMPARED_REQUESTS,
    MESSAGE_VERSION,
    Endpoint,
    GenerationRequest,
    JobStatus,
    model_name,
)
from jobs.producer import Notify
from jobs.settings import JobsSettings
from jobs.submission.custom_ids import CustomIds
from jobs.submission.request_buffer import RequestBuffer
from jobs.submission.request_parser import (
    Item,
    Rules,
    given_id,
    max_total_tokens,
    parse_body,
    parse_item,
    parse_parameters,
)
from jobs.tracing import span
from storage import keys, queries, writes
from storage.keys import QuotaExceeded
from storage.queries import JobView
from storage.records import NewJob, NewRequest, RequestFailure
from storage.session import Database

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_IDEMPOTENCY_KEY_CHARS = 255

_QUEUE_RETRY_S = 30.0  # a guess at when a full queue has room again


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as someone asks for it, before anything about it has been checked."""

    items: Iterable[Item]
    model: str | None = None  # none: the first request's, else the target of this installation
    endpoint: Endpoint = CHAT_ENDPOINT
    parameters: Mapping[str, Any] = field(default_factory=dict)  # for requests that bring none of their own
    metadata: Any = None
    window_s: float | None = None
    traceparent: str | None = None
    compare_plain: Any = None  # how many of the requests are decoded both ways when the job is done
    job_id: str | None = None
    api_key_id: str | None = None
    idempotency_key: str | None = None
    body_sha256: str | None = None


def create_job(submission: Submission, *, database: Database, notify: Notify, settings: JobsSettings) -> str:
    """Record a submission and return its job id: the earlier job's, if its idempotency key has been used before.

    Raise JobRefused for a job that can't be accepted, LimitReached for one that can't be accepted now.
    """
    items = iter(submission.items)
    known = known_models(database, settings)
    head, model = _up_to_the_model(items, submission.model, known, settings.max_requests)
    if not head:
        raise EmptyJob
    rules = _rules(submission, model, known, settings)
    with span("ingest", submission.traceparent, job_id=rules.job_id) as place, RequestBuffer() as buffer:
        job = replace(_new_job(submission, rules, settings), traceparent=place)
        ids = _parse_all(chain(_drained(head), items), rules, settings.max_requests, buffer)
        depth = _queue_depth(database)
        room = depth.reserve(len(buffer), settings.max_requests_queued)
        most = None if room else settings.max_requests_queued
        recorded = _record(job, _named(buffer.requests(), ids), database, most, depth)
    if recorded.conflict:
        raise IdempotencyConflict
    if recorded.created:
        notify(recorded.job_id, rules.model)
    return recorded.job_id


def retry_job(
    job: JobView,
    *,
    api_key_id: str | None,
    idempotency_key: str | None,
    database: Database,
    notify: Notify,
    settings: JobsSettings,
) -> str:
    """Record a new job of the requests of an ended one that have no result, and return its id.

    The ended job stays as it is: its counts and files are final. The new one has its model, endpoint, metadata and
    window, and the requests keep their custom ids, bodies and seeds.
    """
    if not JobStatus(job.status).final:
        raise NotRetryable(f"The job is {job.status}; wait until it has ended, or cancel it.")
    _, context_tokens = _choose_model(job.model, known_models(database, settings), settings)
    again = NewJob(
        id=new_job_id(),
        model=job.model,
        endpoint=job.endpoint,
        window_s=job.expires_at - job.created_at,
        metadata=job.metadata,
        api_key_id=api_key_id,
        idempotency_key=check_idempotency_key(idempotency_key),
        body_sha256=hashlib.sha256(f"retry of {job.id}".encode()).hexdigest(),
        retry_of=job.id,
        body_version=MESSAGE_VERSION,
    )
    try:
        with span("ingest", job_id=again.id) as place, database.write() as session:
            found = queries.requests_to_retry(session, job.id)
            requests = (_with_tokens(request, context_tokens) for request in found)
            first = next(requests, None)
            if first is None:
                raise NotRetryable
            recorded = writes.insert_job(session, replace(again, traceparent=place), chain([first], requests))
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
    """Return a request that was stored before with what it may come to read and write."""
    return replace(request, tokens=max_total_tokens(GenerationRequest.model_validate(request.body), context_tokens))


def create_interactive_job(
    submission: Submission, *, database: Database, notify: Notify, settings: JobsSettings
) -> str:
    """Record a job of one request that somebody waits for, and return its id.

    There are no others that could go on, so what is wrong with the request is raised too; and ServiceUnavailable if
    nobody is there to serve it.
    """
    (item,) = submission.items
    if item.model is None:
        raise MissingParameter("This call needs model.", param="model")
    rules = _rules(submission, submission.model or item.model, known_models(database, settings), settings)
    request = parse_body(item.value, rules)
    if rules.context_tokens is None:
        raise ServiceUnavailable(f"No worker serves {rules.model} right now; try again in a few seconds.")
    with span("ingest", submission.traceparent, job_id=rules.job_id) as place:
        job = replace(_new_job(submission, rules, settings), priority=1, traceparent=place)
        _record(job, [request], database)
    notify(job.id, job.model)
    return job.id


def create_failed_job(
    submission: Submission, failure: RequestFailure, *, database: Database, settings: JobsSettings
) -> str:
    """Record a job whose submission was refused as a whole: one failed request says why to whoever asks for the job."""
    job_id = submission.job_id or new_job_id()
    job = NewJob(
        id=job_id,
        model=submission.model or model_name(settings.target),
        endpoint=submission.endpoint,
        window_s=settings.completion_window_s,
        api_key_id=submission.api_key_id,
        idempotency_key=submission.idempotency_key,
        body_sha256=submission.body_sha256,
    )
    return _record(job, [NewRequest("batch", failure=failure)], database).job_id


def known_models(database: Database, settings: JobsSettings) -> dict[str, int | None]:
    """Return the models a job may name, with their context in tokens where a worker has told it."""
    with database.connect() as session:
        served = {model.target: model.context_tokens for model in queries.models(session)}
    return {model_name(settings.target): None} | served


def new_job_id() -> str:
    """Return a fresh job id. Random: nobody can guess the job of another."""
    return f"batch_{secrets.token_hex(16)}"


def new_call_id(endpoint: Endpoint) -> str:
    """Return a fresh id of a call, which is the job's and the answer's."""
    return f"{'chatcmpl' if endpoint == CHAT_ENDPOINT else 'cmpl'}-{secrets.token_hex(16)}"


def _drained(items: deque[Item]) -> Iterator[Item]:
    """Yield items and keep none: a single one may be as large as a line can be."""
    while items:
        yield items.popleft()


def _up_to_the_model(items: Iterator[Item], model: Any, known: Collection[str], limit: int) -> tuple[deque[Item], Any]:
    """Return the first items, and the model that the job asks for, or else the first item that can ask for one.

    An item that can't be read, or names a model that does not exist, fails alone: it does not choose for the others.
    """
    head: deque[Item] = deque()
    unknown: Any = None
    for item in items:
        if model is not None or (item.is_readable and (item.model is None or _is_known(item.model, known))):
            head.append(item)
            return head, item.model if model is None else model
        unknown = item.model if unknown is None else unknown
        head.append(_without_text(item))
        if len(head) > limit:
            break
    return head, unknown


def _is_known(model: Any, known: Collection[str]) -> bool:
    return isinstance(model, str) and model in known


def _without_text(item: Item) -> Item:
    """Return an item that names no known model with nothing but its id: many of them may come before one that does."""
    if not item.is_readable:
        return item
    given = given_id(item)
    if given is None or not given.is_own:
        return replace(item, value={"model": False}, recovered_id=None if given is None else given.text)
    return replace(item, value={"model": False, "custom_id": given.text})


def _named(requests: Iterable[NewRequest], ids: Mapping[int, str]) -> Iterator[NewRequest]:
    """Yield requests with the ids that they have in place of their own."""
    for index, request in enumerate(requests):
        yield replace(request, custom_id=ids[index]) if index in ids else request


def _parse_all(items: Iterable[Item], rules: Rules, limit: int, buffer: RequestBuffer) -> Mapping[int, str]:
    """Put the requests of all items into the buffer; return the ids of those that were given none of their own."""
    ids = CustomIds()
    for item in items:
        if len(buffer) == limit:
            raise TooManyRequests(f"One job may hold {limit} requests; split the file into several jobs.")
        request = parse_item(item, rules)
        earlier = ids.add(item.index, item.location, given_id(item))
        if earlier is not None:
            message = f"{earlier} and {item.location} have the same custom_id {request.custom_id!r}."
            raise DuplicateCustomId(message, param="custom_id", line=item.line)
        buffer.add(request)
        del item, request  # before the next one is read
    return ids.generated()


def _rules(submission: Submission, asked: Any, known: Mapping[str, int | None], settings: JobsSettings) -> Rules:
    model, context_tokens = _choose_model(asked, known, settings)
    return Rules(
        job_id=submission.job_id or new_job_id(),
        model=model,
        endpoint=submission.endpoint,
        defaults=parse_parameters(submission.parameters, submission.endpoint),
        max_prompt_chars=settings.max_prompt_chars,
        context_tokens=context_tokens,
    )


def _choose_model(asked: Any, known: Mapping[str, int | None], settings: JobsSettings) -> tuple[str, int | None]:
    model = model_name(settings.target) if asked is None else asked
    if not isinstance(model, str) or model not in known:
        raise UnknownModel(
            f"There is no model {str(model)[:80]!r}; there is {', '.join(sorted(known))}.", param="model"
        )
    return model, known[model]


def _new_job(submission: Submission, rules: Rules, settings: JobsSettings) -> NewJob:
    return NewJob(
        id=rules.job_id,
        model=rules.model,
        endpoint=rules.endpoint,
        window_s=submission.window_s or settings.completion_window_s,
        metadata=check_metadata(submission.metadata),
        api_key_id=submission.api_key_id,
        idempotency_key=check_idempotency_key(submission.idempotency_key),
        body_sha256=submission.body_sha256,
        body_version=MESSAGE_VERSION,
        compare_plain=check_compare_plain(submission.compare_plain),
    )


def _record(
    job: NewJob,
    requests: Iterable[NewRequest],
    database: Database,
    most: int | None = None,
    depth: QueueDepth | None = None,
) -> writes.InsertedJob:
    """Record a job; raise LimitReached for one too many, of its key or with more than `most` requests of all."""
    try:
        with database.write() as session:
            recorded = writes.insert_job(session, job, requests)
            if recorded.created and most is not None:
                counted = check_queue_limit(session, most)
                if depth is not None:
                    depth.update(counted)
            return recorded
    except QuotaExceeded as exceeded:
        raise quota_error(exceeded) from exceeded


class QueueDepth:
    """How many requests wait, as this process knows: to count them takes longer the more open jobs there are.

    A count holds for a second, with what was added here since, and only while half of the room is free: nearer to the
    limit they are counted with every job.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet."""
        self._now = now
        self._lock = threading.Lock()
        self._requests = 0
        self._counted_at = float("-inf")

    def reserve(self, requests: int, most: int) -> bool:
        """Add so many requests and return True if there is room for certain; else they must be counted."""
        with self._lock:
            fresh = self._now() - self._counted_at < _COUNT_HOLDS_S
            if not fresh or self._requests + requests > most / 2:
                return False
            self._requests += requests
            return True

    def update(self, requests: int) -> None:
        """Note how many requests wait."""
        with self._lock:
            self._requests, self._counted_at = requests, self._now()


_COUNT_HOLDS_S = 1.0
_depth_by_engine: WeakKeyDictionary[Engine, QueueDepth] = WeakKeyDictionary()


def _queue_depth(database: Database) -> QueueDepth:
    return _depth_by_engine.setdefault(database.engine, QueueDepth())


def check_queue_limit(session: Session, most: int) -> int:
    """Return how many requests wait; raise QueueFull, which undoes the transaction, if that is more than the most.

    Counted with the new job, and behind the look for an earlier one: a submission that is only repeated is not refused.
    """
    depth = keys.open_work(session).requests
    if depth > most:
        raise QueueFull(
            f"With this job {depth} requests would wait, and the service takes {most} at once.",
            retry_after_s=_QUEUE_RETRY_S,
        )
    return depth


def quota_error(exceeded: QuotaExceeded) -> LimitReached:
    """Return what a key is told whose limits leave no room for a job."""
    return LimitReached(
        f"This key may have {exceeded.limit} {exceeded.what} in the queue; with this job there would be "
        f"{exceeded.asked}.",
        retry_after_s=_QUEUE_RETRY_S,
    )


def check_metadata(metadata: Any) -> Mapping[str, str] | None:
    """Return metadata as it is kept; raise InvalidValue beyond OpenAI's limits."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping) or len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidValue(f"must be an object of at most {MAX_METADATA_PAIRS} pairs", param="metadata")
    for key, value in metadata.items():
        _refuse_long_metadata(key, MAX_METADATA_KEY_CHARS, "key")
        _refuse_long_metadata(value, MAX_METADATA_VALUE_CHARS, "value")
    return metadata


def _refuse_long_metadata(text: Any, limit: int, part: str) -> None:
    if not isinstance(text, str) or len(text) > limit or "\0" in text:
        raise InvalidValue(f"Every {part} must be a string of at most {limit} characters.", param="metadata")


def check_idempotency_key(key: str | None) -> str | None:
    """Return the key; raise InvalidValue for one that is empty or too long."""
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidValue(f"must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters", param="Idempotency-Key")
    return key


def check_compare_plain(count: Any) -> int:
    """Return how many requests are decoded both ways; raise InvalidValue for what is no such number."""
    if count is None:
        return 0
    if type(count) is not int or not 1 <= count <= MAX_COMPARED_REQUESTS:
        raise InvalidValue(f"must be a whole number from 1 to {MAX_COMPARED_REQUESTS}", param="compare_plain")
    return count
