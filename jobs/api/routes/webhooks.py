"""Routes of webhooks: endpoints in OpenAI's format, which its clients call, and the deliveries to them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.dependencies import CurrentServices, Services
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import ERRORS, WEBHOOK_BODY, WEBHOOK_CHANGE_BODY, WEBHOOK_SECRET_BODY, WEBHOOK_TEST_BODY
from jobs.api.schemas.route_responses import responses
from jobs.api.schemas.webhooks import (
    WebhookDeliveryPage,
    WebhookDeliveryReply,
    WebhookEndpointDeleted,
    WebhookEndpointPage,
    WebhookEndpointReply,
    WebhookEndpointSecretReply,
    WebhookEventTypes,
    WebhookTestReply,
    delivery,
    endpoint,
)
from jobs.api.submissions import json_object, require_json
from jobs.api.write_threads import run_write
from jobs.errors import InvalidValue, MissingParameter, NotFound, NotPermitted, WebhookUnreachable
from jobs.messages import JobStatus
from jobs.submission.values import boolean, clean_text, refuse_unknown, shown
from jobs.webhooks.addresses import AddressRefused, AddressRules
from jobs.webhooks.request import WebhookEvent, send
from jobs.webhooks.signature import new_secret
from storage import queries, webhooks
from storage.webhooks import EVENT_TYPES, EndpointView, NewEndpoint

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=ERRORS)

T = TypeVar("T")

_MAX_BODY_BYTES: Final = 65_536
_MAX_NAME_CHARS: Final = 256
_MAX_ENDPOINTS: Final = 100  # per key
_OLD_SECRET_S: Final = 86_400.0
_calls = ThreadPoolExecutor(4, "webhook-calls")  # to resolve names and to test endpoints, which takes seconds


@router.post(
    "/webhook_endpoints",
    response_model=None,
    openapi_extra=WEBHOOK_BODY,
    responses=responses(WebhookEndpointSecretReply, 400, 404),
)
async def create(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Add a URL that is called when jobs of the caller's key end. The reply alone shows the secret that signs."""
    fields = await _fields(request, services, {"name", "url", "event_types", "job_id", "all_keys"})
    for name in ("url", "event_types"):
        if name not in fields:
            raise MissingParameter(f"Missing field {name}.", param=name)
    new = NewEndpoint(
        id=f"wh_{secrets.token_hex(16)}",
        api_key_id=caller.key_id,
        name=_name(fields.get("name", "")),
        url=await _url(fields["url"], services),
        event_types=_event_types(fields["event_types"]),
        secret=new_secret(),
        job_id=_job_id(fields.get("job_id")),
        all_keys=_all_keys(fields.get("all_keys", False), caller),
    )
    return JSONResponse(endpoint(await run_write(_add, services, new, caller), with_secret=True))


@router.get("/webhook_endpoints", response_model=None, responses=responses(WebhookEndpointPage, 400))
def list_endpoints(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """List endpoints, newest first. `after`: last id of the page before."""
    with services.database.read() as session:
        if after and webhooks.endpoint(session, after, caller.sees) is None:
            raise InvalidValue("Unknown endpoint id in `after`.", param="after")
        found, has_more = webhooks.endpoints(session, limit, after or None, caller.sees)
    return JSONResponse(serializers.page([endpoint(one) for one in found], has_more))


@router.get("/webhook_endpoints/{endpoint_id}", response_model=None, responses=responses(WebhookEndpointReply, 404))
def retrieve(endpoint_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Read one endpoint."""
    with services.database.read() as session:
        return JSONResponse(endpoint(_found(session, endpoint_id, caller)))


@router.post(
    "/webhook_endpoints/{endpoint_id}",
    response_model=None,
    openapi_extra=WEBHOOK_CHANGE_BODY,
    responses=responses(WebhookEndpointReply, 400, 404),
)
async def change(endpoint_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Change the name, the URL or the event types of an endpoint."""
    fields = await _fields(request, services, {"name", "url", "event_types"})
    columns: dict[str, Any] = {}
    if "name" in fields:
        columns["name"] = _name(fields["name"])
    if "event_types" in fields:
        columns["event_types"] = list(_event_types(fields["event_types"]))
    if "url" in fields:
        columns["url"] = await _url(fields["url"], services)
    return JSONResponse(endpoint(await run_write(_change, services, endpoint_id, caller, columns)))


@router.delete(
    "/webhook_endpoints/{endpoint_id}", response_model=None, responses=responses(WebhookEndpointDeleted, 404)
)
async def remove(endpoint_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Delete an endpoint, with the deliveries that wait."""

    def write() -> bool:
        with services.database.write() as session:
            return webhooks.remove_endpoint(session, endpoint_id, caller.sees)

    if not await run_write(write):
        raise _no_endpoint(endpoint_id)
    return JSONResponse({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret",
    response_model=None,
    openapi_extra=WEBHOOK_SECRET_BODY,
    responses=responses(WebhookEndpointSecretReply, 400, 404),
)
async def rotate_secret(
    endpoint_id: str, request: Request, services: CurrentServices, caller: CurrentCaller
) -> Response:
    """Replace the secret of an endpoint. With `keep_old_secret_active_for_24_hours`, both sign for a day."""
    name = "keep_old_secret_active_for_24_hours"
    fields = await _fields(request, services, {name})
    kept = boolean(fields.get(name, False), name)

    def write() -> EndpointView:
        with services.database.write() as session:
            found = _found(session, endpoint_id, caller)
            until = time.time() + _OLD_SECRET_S if kept else None
            old = {"old_secret": found.secret if kept else None, "old_secret_until": until}
            webhooks.change_endpoint(session, endpoint_id, secret=new_secret(), **old)
            return _found(session, endpoint_id, caller)

    return JSONResponse(endpoint(await run_write(write), with_secret=True))


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    response_model=None,
    openapi_extra=WEBHOOK_TEST_BODY,
    responses=responses(WebhookTestReply, 400, 404),
)
async def test(endpoint_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Send a sample event to an endpoint now, once, and return the status that it answers."""
    fields = await _fields(request, services, {"event_type"})
    (kind,) = _event_types([fields.get("event_type", EVENT_TYPES[0])], "event_type")
    settings = services.settings

    def call() -> int:
        with services.database.read() as session:
            found = _found(session, endpoint_id, caller)
        sample_id = f"{'batch' if kind.startswith('batch') else 'resp'}_{'0' * 32}"
        event = WebhookEvent(f"evt_{secrets.token_hex(16)}", kind, sample_id, time.time())
        rules = AddressRules.of(settings.webhook_networks)
        attempt = send(event, found, rules, time.time(), settings.webhook_timeout_s)
        if attempt.status_code is None:
            raise WebhookUnreachable(f"{found.url} was not reached: {attempt.error}")
        return attempt.status_code

    status_code = await _in_thread(call)
    about = {"object": "webhook_endpoint.test", "webhook_endpoint_id": endpoint_id, "event_type": kind}
    return JSONResponse(about | {"status_code": status_code, "success": True})


@router.get(
    "/webhook_endpoints/{endpoint_id}/deliveries", response_model=None, responses=responses(WebhookDeliveryPage, 404)
)
def list_deliveries_to(
    endpoint_id: str,
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    status: Literal["pending", "delivered", "dead"] | None = None,
) -> Response:
    """List the deliveries to one endpoint, newest first. `after`: last id of the page before."""
    with services.database.read() as session:
        _found(session, endpoint_id, caller)
    return _deliveries(services, caller, limit, after, status, endpoint_id)


@router.get("/webhook_deliveries", response_model=None, responses=responses(WebhookDeliveryPage, 400))
def list_deliveries(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    status: Literal["pending", "delivered", "dead"] | None = None,
) -> Response:
    """List the deliveries to all endpoints, newest first. Those that are `dead` are sent again only by hand."""
    return _deliveries(services, caller, limit, after, status)


@router.post(
    "/webhook_deliveries/{delivery_id}/redeliver", response_model=None, responses=responses(WebhookDeliveryReply, 404)
)
async def redeliver(delivery_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Send an event again, with the same id. One that waits for its next attempt stays as it is."""

    def write() -> Response:
        with services.database.write() as session:
            if webhooks.delivery(session, delivery_id, caller.sees) is None:
                raise NotFound(f"There is no delivery {delivery_id[:80]!r}.", param="id")
            webhooks.redeliver(session, delivery_id)
            found = webhooks.delivery(session, delivery_id, caller.sees)
        assert found is not None
        return JSONResponse(delivery(found))

    return await run_write(write)


@router.get("/webhook_event_types", response_model=None, responses=responses(WebhookEventTypes))
async def list_event_types(caller: CurrentCaller) -> Response:
    """List the types of events."""
    return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})


def _deliveries(
    services: Services,
    caller: Caller,
    limit: int,
    after: str | None,
    status: str | None,
    endpoint_id: str | None = None,
) -> Response:
    with services.database.read() as session:
        if after and webhooks.delivery(session, after, caller.sees) is None:
            raise InvalidValue("Unknown delivery id in `after`.", param="after")
        page = webhooks.deliveries(session, limit, after or None, caller.sees, endpoint_id=endpoint_id, status=status)
    return JSONResponse(serializers.page([delivery(one) for one in page.deliveries], page.has_more))


def _add(services: Services, new: NewEndpoint, caller: Caller) -> EndpointView:
    with services.database.write() as session:
        if webhooks.count_endpoints(session, caller.key_id) >= _MAX_ENDPOINTS:
            raise InvalidValue(f"A key has at most {_MAX_ENDPOINTS} webhook endpoints: delete one.")
        if new.job_id is not None:
            status = webhooks.lock_status(session, new.job_id)
            if status is None or queries.job(session, new.job_id, caller.sees) is None:
                raise NotFound(f"There is no job {new.job_id[:80]!r}.", param="job_id")
            if JobStatus(status).final:
                raise InvalidValue(f"The job is {status} already: no event of it will come.", param="job_id")
        webhooks.add_endpoint(session, new)
        return _found(session, new.id, caller)


def _change(services: Services, endpoint_id: str, caller: Caller, columns: dict[str, Any]) -> EndpointView:
    with services.database.write() as session:
        _found(session, endpoint_id, caller)
        if columns:
            webhooks.change_endpoint(session, endpoint_id, **columns)
        return _found(session, endpoint_id, caller)


def _found(session: Session, endpoint_id: str, caller: Caller) -> EndpointView:
    found = webhooks.endpoint(session, endpoint_id, caller.sees)
    if found is None:
        raise _no_endpoint(endpoint_id)
    return found


def _no_endpoint(endpoint_id: str) -> NotFound:
    return NotFound(f"There is no webhook endpoint {endpoint_id[:80]!r}.", param="id")


async def _fields(request: Request, services: Services, known: set[str]) -> dict[str, Any]:
    require_json(request.headers)
    async with services.bodies.received(request, _MAX_BODY_BYTES) as body:
        fields = json_object(body.open().read())
    refuse_unknown(fields, known)
    return fields


async def _in_thread(call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_calls, call)


async def _url(url: Any, services: Services) -> str:
    """Return a URL that may be called now; it is checked again with each call."""
    if not isinstance(url, str):
        raise InvalidValue("must be a string", param="url")
    try:
        await _in_thread(lambda: AddressRules.of(services.settings.webhook_networks).check_url(url))
    except AddressRefused as refused:
        raise InvalidValue(f"{refused}.", param="url") from refused
    return url


def _name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS:
        raise InvalidValue(f"must be a string of at most {_MAX_NAME_CHARS} characters", param="name")
    return clean_text(name, "name")


def _event_types(given: Any, param: str = "event_types") -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise InvalidValue(f"must be a list of {', '.join(EVENT_TYPES)}", param=param)
    for kind in given:
        if kind not in EVENT_TYPES:
            raise InvalidValue(f"must be of {', '.join(EVENT_TYPES)}, not {shown(kind)}", param=param)
    return tuple(dict.fromkeys(given))


def _job_id(job_id: Any) -> str | None:
    if job_id is not None and not isinstance(job_id, str):
        raise InvalidValue("must be a string", param="job_id")
    return job_id


def _all_keys(asked: Any, caller: Caller) -> bool:
    if boolean(asked, "all_keys") and not caller.sees_all:
        raise NotPermitted("Events of the jobs of all keys need the scope admin.", param="all_keys")
    return bool(asked)
