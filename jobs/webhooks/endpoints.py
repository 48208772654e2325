"""What callers do with webhook endpoints: add, change, test and remove them, and send events again.

Routes and pages call these functions in threads: each waits for the database, and those that take a URL resolve its
name or call it, for which `in_call_thread` has threads of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from sqlalchemy.orm import Session

from jobs.errors import InvalidValue, MissingParameter, NotFound, NotPermitted, WebhookUnreachable
from jobs.messages import JobStatus
from jobs.settings import JobsSettings
from jobs.submission.values import boolean, clean_text, shown
from jobs.webhooks.addresses import AddressRefused, AddressRules
from jobs.webhooks.request import WebhookEvent, send
from jobs.webhooks.signature import new_secret
from storage import queries, webhooks
from storage.session import Database
from storage.webhooks import EVENT_TYPES, DeliveryView, EndpointView, NewEndpoint

T = TypeVar("T")

MAX_NAME_CHARS: Final = 256
_MAX_ENDPOINTS: Final = 100  # per key
_OLD_SECRET_S: Final = 86_400.0
_calls = ThreadPoolExecutor(4, "webhook-calls")  # to resolve names and to test endpoints, which takes seconds


async def in_call_thread(call: Callable[[], T]) -> T:
    """Run a call that resolves a name or sends a request, and may take seconds."""
    return await asyncio.get_running_loop().run_in_executor(_calls, call)


def read_endpoint(fields: Mapping[str, Any], owner: str, *, sees_all: bool, settings: JobsSettings) -> NewEndpoint:
    """Return the endpoint that a caller describes; resolves the name of its URL. Raise a BasicError.

    `sees_all`: the caller may have the events of all keys.
    """
    for name in ("url", "event_types"):
        if name not in fields:
            raise MissingParameter(f"Missing field {name}.", param=name)
    return NewEndpoint(
        id=f"wh_{secrets.token_hex(16)}",
        api_key_id=owner,
        name=_name(fields.get("name", "")),
        url=_url(fields["url"], settings),
        event_types=read_event_types(fields["event_types"]),
        secret=new_secret(),
        job_id=_job_id(fields.get("job_id")),
        all_keys=_all_keys(fields.get("all_keys", False), sees_all),
    )


def read_changes(fields: Mapping[str, Any], settings: JobsSettings) -> dict[str, Any]:
    """Return the columns that a caller changes: name, URL and event types; resolves the name of the URL."""
    columns: dict[str, Any] = {}
    if "name" in fields:
        columns["name"] = _name(fields["name"])
    if "event_types" in fields:
        columns["event_types"] = list(read_event_types(fields["event_types"]))
    if "url" in fields:
        columns["url"] = _url(fields["url"], settings)
    return columns


def read_event_types(given: Any, param: str = "event_types") -> tuple[str, ...]:
    """Return types of events without repetition; raise InvalidValue."""
    if not isinstance(given, list) or not given:
        raise InvalidValue(f"must be a list of {', '.join(EVENT_TYPES)}", param=param)
    for kind in given:
        if kind not in EVENT_TYPES:
            raise InvalidValue(f"must be of {', '.join(EVENT_TYPES)}, not {shown(kind)}", param=param)
    return tuple(dict.fromkeys(given))


def add_endpoint(database: Database, new: NewEndpoint, sees: str | None) -> EndpointView:
    """Store an endpoint; raise InvalidValue or NotFound if its key has too many, or its job has ended."""
    with database.write() as session:
        if webhooks.count_endpoints(session, new.api_key_id) >= _MAX_ENDPOINTS:
            raise InvalidValue(f"A key has at most {_MAX_ENDPOINTS} webhook endpoints: delete one.")
        if new.job_id is not None:
            status = webhooks.lock_status(session, new.job_id)
            if status is None or queries.job(session, new.job_id, sees) is None:
                raise NotFound(f"There is no job {new.job_id[:80]!r}.", param="job_id")
            if JobStatus(status).final:
                raise InvalidValue(f"The job is {status} already: no event of it will come.", param="job_id")
        webhooks.add_endpoint(session, new)
        return find_endpoint(session, new.id, sees)


def change_endpoint(database: Database, endpoint_id: str, sees: str | None, columns: Mapping[str, Any]) -> EndpointView:
    """Change an endpoint and return it."""
    with database.write() as session:
        find_endpoint(session, endpoint_id, sees)
        if columns:
            webhooks.change_endpoint(session, endpoint_id, **columns)
        return find_endpoint(session, endpoint_id, sees)


def rotate_secret(database: Database, endpoint_id: str, sees: str | None, *, keep_old: bool) -> EndpointView:
    """Give an endpoint a new secret, and return it. `keep_old`: the old one signs too, for a day."""
    with database.write() as session:
        found = find_endpoint(session, endpoint_id, sees)
        until = time.time() + _OLD_SECRET_S if keep_old else None
        old = {"old_secret": found.secret if keep_old else None, "old_secret_until": until}
        webhooks.change_endpoint(session, endpoint_id, secret=new_secret(), **old)
        return find_endpoint(session, endpoint_id, sees)


def remove_endpoint(database: Database, endpoint_id: str, sees: str | None) -> None:
    """Remove an endpoint with the deliveries that wait."""
    with database.write() as session:
        if not webhooks.remove_endpoint(session, endpoint_id, sees):
            raise _no_endpoint(endpoint_id)


def send_sample(database: Database, settings: JobsSettings, endpoint_id: str, sees: str | None, kind: str) -> int:
    """Send a sample event of a type now, once; return the status that the URL answers, or raise WebhookUnreachable."""
    with database.read() as session:
        found = find_endpoint(session, endpoint_id, sees)
    sample_id = f"{'batch' if kind.startswith('batch') else 'resp'}_{'0' * 32}"
    event = WebhookEvent(f"evt_{secrets.token_hex(16)}", kind, sample_id, time.time())
    rules = AddressRules.of(settings.webhook_networks)
    attempt = send(event, found, rules, time.time(), settings.webhook_timeout_s)
    if attempt.status_code is None:
        raise WebhookUnreachable(f"{found.url} was not reached: {attempt.error}")
    return attempt.status_code


def redeliver(database: Database, delivery_id: str, sees: str | None) -> DeliveryView:
    """Queue a delivery again and return it; one that waits for its next attempt stays as it is."""
    with database.write() as session:
        if webhooks.delivery(session, delivery_id, sees) is None:
            raise NotFound(f"There is no delivery {delivery_id[:80]!r}.", param="id")
        webhooks.redeliver(session, delivery_id)
        found = webhooks.delivery(session, delivery_id, sees)
    assert found is not None
    return found


def find_endpoint(session: Session, endpoint_id: str, sees: str | None) -> EndpointView:
    """Return an endpoint; raise NotFound."""
    found = webhooks.endpoint(session, endpoint_id, sees)
    if found is None:
        raise _no_endpoint(endpoint_id)
    return found


def _no_endpoint(endpoint_id: str) -> NotFound:
    return NotFound(f"There is no webhook endpoint {endpoint_id[:80]!r}.", param="id")


def _url(url: Any, settings: JobsSettings) -> str:
    """Return a URL that may be called now; it is checked again with each call."""
    if not isinstance(url, str):
        raise InvalidValue("must be a string", param="url")
    try:
        AddressRules.of(settings.webhook_networks).check_url(url)
    except AddressRefused as refused:
        raise InvalidValue(f"{refused}.", param="url") from refused
    return url


def _name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
        raise InvalidValue(f"must be a string of at most {MAX_NAME_CHARS} characters", param="name")
    return clean_text(name, "name")


def _job_id(job_id: Any) -> str | None:
    if job_id is not None and not isinstance(job_id, str):
        raise InvalidValue("must be a string", param="job_id")
    return job_id


def _all_keys(asked: Any, sees_all: bool) -> bool:
    if boolean(asked, "all_keys") and not sees_all:
        raise NotPermitted("Events of the jobs of all keys need the scope admin.", param="all_keys")
    return bool(asked)
