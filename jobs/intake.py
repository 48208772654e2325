"""The one door behind both entrances: a submission is checked, recorded in one transaction, and its doorbell rung.

(jobs.api | jobs.ingest) -> [intake] -> storage.writes.  Knows no HTTP and no Celery: it is handed a `ring` to call.
What is wrong with one request fails that request; what is wrong with the job as a whole raises JobRefused.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jobs.errors import DuplicateCustomId, EmptyJob, IdempotencyConflict, InvalidValue, TooManyRequests, UnknownModel
from jobs.items import Item, Rules, parse_item, parse_parameters
from jobs.messages import CHAT_ENDPOINT, Endpoint, model_name
from jobs.producer import Ring
from jobs.settings import JobsSettings
from storage import queries, writes
from storage.records import NewJob, NewRequest, Refusal
from storage.session import Database

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_IDEMPOTENCY_KEY_CHARS = 255


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as someone asks for it, before anything about it has been checked."""

    items: Iterable[Item]
    model: str | None = None  # none: the first request's, else the target of this installation
    endpoint: Endpoint = CHAT_ENDPOINT
    parameters: Mapping[str, Any] = field(default_factory=dict)  # for requests that bring none of their own
    metadata: Any = None
    window_s: float | None = None
    job_id: str | None = None
    api_key_id: str | None = None
    idempotency_key: str | None = None
    body_sha256: str | None = None


def accept_job(submission: Submission, *, database: Database, ring: Ring, settings: JobsSettings) -> str:
    """Record a submission and return its job id: the earlier job's, if its idempotency key has been used before."""
    items = _all_items(submission.items, settings.max_requests)
    rules = _rules(submission, items[0], database, settings)
    requests = [parse_item(item, rules) for item in items]
    _refuse_duplicates(items, requests)
    recorded = _record(_new_job(submission, rules, settings), requests, database)
    if recorded.conflict:
        raise IdempotencyConflict
    if recorded.created:
        ring(recorded.job_id, rules.model)
    return recorded.job_id


def record_refused_job(submission: Submission, refusal: Refusal, *, database: Database, settings: JobsSettings) -> str:
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
    return _record(job, [NewRequest("batch", refusal=refusal)], database).job_id


def known_models(database: Database, settings: JobsSettings) -> dict[str, int | None]:
    """Return the models a job may name, with their context in tokens where a worker has told it."""
    with database.read() as session:
        served = {model.target: model.context_tokens for model in queries.models(session)}
    return {model_name(settings.target): None} | served


def new_job_id() -> str:
    """Return a fresh job id. Random: nobody can guess the job of another."""
    return f"batch_{secrets.token_hex(16)}"


def _all_items(items: Iterable[Item], limit: int) -> list[Item]:
    taken = list(islice(items, limit + 1))
    if not taken:
        raise EmptyJob
    if len(taken) > limit:
        raise TooManyRequests(f"One job may hold {limit} requests; split the file into several jobs.")
    return taken


def _rules(submission: Submission, first: Item, database: Database, settings: JobsSettings) -> Rules:
    model, context_tokens = _choose_model(submission.model or first.model, database, settings)
    return Rules(
        job_id=submission.job_id or new_job_id(),
        model=model,
        endpoint=submission.endpoint,
        defaults=parse_parameters(submission.parameters),
        max_prompt_chars=settings.max_prompt_chars,
        context_tokens=context_tokens,
    )


def _choose_model(asked: Any, database: Database, settings: JobsSettings) -> tuple[str, int | None]:
    known = known_models(database, settings)
    model = model_name(settings.target) if asked is None else asked
    if not isinstance(model, str) or model not in known:
        raise UnknownModel(
            f"There is no model {str(model)[:80]!r}; there is {', '.join(sorted(known))}.", param="model"
        )
    return model, known[model]


def _refuse_duplicates(items: Sequence[Item], requests: Sequence[NewRequest]) -> None:
    seen: dict[str, Item] = {}
    for item, request in zip(items, requests, strict=True):
        earlier = seen.setdefault(request.custom_id, item)
        if earlier is not item:
            message = f"{earlier.place} and {item.place} have the same custom_id {request.custom_id!r}."
            raise DuplicateCustomId(message, param="custom_id", line=item.line)


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
    )


def _record(job: NewJob, requests: Sequence[NewRequest], database: Database) -> writes.RecordedJob:
    with database.write() as session:
        return writes.record_job(session, job, requests)


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
