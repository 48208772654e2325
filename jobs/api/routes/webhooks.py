"""Routes of webhooks: endpoints in OpenAI's format, which its clients call, and the deliveries to them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

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
from jobs.errors import InvalidValue
from jobs.submission.values import boolean, refuse_unknown
from jobs.webhooks import endpoints
from jobs.webhooks.endpoints import in_call_thread
from storage import webhooks
from storage.webhooks import EVENT_TYPES

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=ERRORS)

_MAX_BODY_BYTES: Final = 65_536


@router.post(
    "/webhook_endpoints",
    response_model=None,
    openapi_extra=WEBHOOK_BODY,
    responses=responses(WebhookEndpointSecretReply, 400, 404),
)
async def create(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Add a URL that is called when jobs of the caller's key end. The reply alone shows the secret that signs."""
    fields = await _fields(request, services, {"name", "url", "event_types", "job_id", "all_keys"})
    read = partial(endpoints.read_endpoint, fields, caller.key_id, sees_all=caller.sees_all, settings=services.settings)
    new = await in_call_thread(read)
    return JSONResponse(
        endpoint(await run_write(endpoints.add_endpoint, services.database, new, caller.sees), with_secret=True)
    )


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
        return JSONResponse(endpoint(endpoints.find_endpoint(session, endpoint_id, caller.sees)))


@router.post(
    "/webhook_endpoints/{endpoint_id}",
    response_model=None,
    openapi_extra=WEBHOOK_CHANGE_BODY,
    responses=responses(WebhookEndpointReply, 400, 404),
)
async def change(endpoint_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Change the name, the URL or the event types of an endpoint."""
    fields = await _fields(request, services, {"name", "url", "event_types"})
    columns = await in_call_thread(lambda: endpoints.read_changes(fields, services.settings))
    changed = await run_write(endpoints.change_endpoint, services.database, endpoint_id, caller.sees, columns)
    return JSONResponse(endpoint(changed))


@router.delete(
    "/webhook_endpoints/{endpoint_id}", response_model=None, responses=responses(WebhookEndpointDeleted, 404)
)
async def remove(endpoint_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Delete an endpoint, with the deliveries that wait."""
    await run_write(endpoints.remove_endpoint, services.database, endpoint_id, caller.sees)
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
    changed = await run_write(endpoints.rotate_secret, services.database, endpoint_id, caller.sees, keep_old=kept)
    return JSONResponse(endpoint(changed, with_secret=True))


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    response_model=None,
    openapi_extra=WEBHOOK_TEST_BODY,
    responses=responses(WebhookTestReply, 400, 404),
)
async def test(endpoint_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Send a sample event to an endpoint now, once, and return the status that it answers."""
    fields = await _fields(request, services, {"event_type"})
    (kind,) = endpoints.read_event_types([fields.get("event_type", EVENT_TYPES[0])], "event_type")
    send = partial(endpoints.send_sample, services.database, services.settings, endpoint_id, caller.sees, kind)
    status_code = await in_call_thread(send)
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
        endpoints.find_endpoint(session, endpoint_id, caller.sees)
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
    return JSONResponse(delivery(await run_write(endpoints.redeliver, services.database, delivery_id, caller.sees)))


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


async def _fields(request: Request, services: Services, known: set[str]) -> dict[str, Any]:
    require_json(request.headers)
    async with services.bodies.received(request, _MAX_BODY_BYTES) as body:
        fields = json_object(body.open().read())
    refuse_unknown(fields, known)
    return fields
