"""Replies of webhook endpoints, in OpenAI's shapes with two more fields, `job_id` and `all_keys`, and of deliveries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from jobs.webhooks.signature import secret_hint
from storage.webhooks import DeliveryView, EndpointView

Json = dict[str, Any]


class _WebhookReply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WebhookEndpointReply(_WebhookReply):
    """A URL that is called when jobs end. Its secret is shown when it is created or rotated, and never again."""

    id: str
    object: Literal["webhook_endpoint"]
    name: str
    url: str
    event_types: list[str]
    job_id: str | None
    all_keys: bool
    signing_secret_hint: str
    created_at: int
    updated_at: int


class WebhookEndpointSecretReply(WebhookEndpointReply):
    """A URL that is called when jobs end, with its secret."""

    signing_secret: str


class WebhookEndpointPage(_WebhookReply):
    """A page of the list of endpoints."""

    object: Literal["list"]
    data: list[WebhookEndpointReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookEndpointDeleted(_WebhookReply):
    """Confirmation that an endpoint was deleted."""

    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: Literal[True]


class WebhookTestReply(_WebhookReply):
    """How an endpoint answered a test."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True]


class WebhookEventTypes(_WebhookReply):
    """The types of events."""

    object: Literal["list"]
    data: list[str]


class WebhookDeliveryReply(_WebhookReply):
    """One event for one endpoint: pending, delivered or dead."""

    id: str
    object: Literal["webhook_delivery"]
    webhook_endpoint_id: str
    event_type: str
    job_id: str
    status: Literal["pending", "delivered", "dead"]
    attempts: int
    created_at: int
    next_attempt_at: int | None
    ended_at: int | None
    last_status_code: int | None
    last_error: str | None


class WebhookDeliveryPage(_WebhookReply):
    """A page of the list of deliveries."""

    object: Literal["list"]
    data: list[WebhookDeliveryReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


def endpoint(view: EndpointView, *, with_secret: bool = False) -> Json:
    """Return an endpoint; its secret only if asked."""
    return {
        "id": view.id,
        "object": "webhook_endpoint",
        "name": view.name,
        "url": view.url,
        "event_types": list(view.event_types),
        "job_id": view.job_id,
        "all_keys": view.all_keys,
        "signing_secret_hint": secret_hint(view.secret),
        "created_at": int(view.created_at),
        "updated_at": int(view.updated_at),
        **({"signing_secret": view.secret} if with_secret else {}),
    }


def delivery(view: DeliveryView) -> Json:
    """Return a delivery."""
    return {
        "id": view.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": view.endpoint_id,
        "event_type": view.event_type,
        "job_id": view.job_id,
        "status": view.status,
        "attempts": view.attempts,
        "created_at": int(view.created_at),
        "next_attempt_at": int(view.next_at) if view.status == "pending" else None,
        "ended_at": None if view.ended_at is None else int(view.ended_at),
        "last_status_code": view.last_status_code,
        "last_error": view.last_error,
    }
