"""Request schemas and example responses of files and batches, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final

from jobs.api.schemas.openapi import IDEMPOTENCY, named
from jobs.api.schemas.replies import ErrorReply
from jobs.messages import MAX_COMPARED_REQUESTS

Json = dict[str, Any]

FILE: Final[Json] = {
    "id": "file-0279686e3beef124974af6614f487747",
    "object": "file",
    "bytes": 437,
    "created_at": 1795572489,
    "expires_at": 1798164489,
    "filename": "batch.jsonl",
    "purpose": "batch",
    "status": "processed",
    "status_details": None,
}

ORDER: Final[Json] = {
    "input_file_id": FILE["id"],
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
    "metadata": {"team": "search"},
}

BATCH: Final[Json] = {
    "id": "batch_442ad11c58dfc0dbc6a6fdf44fa34172",
    "object": "batch",
    "status": "completed",
    "model": "smollm2-135m-instruct",
    "endpoint": ORDER["endpoint"],
    "input_file_id": FILE["id"],
    "output_file_id": "file-387c5165827d5c75f2f86833c022a1bd",
    "error_file_id": None,
    "errors": None,
    "completion_window": "24h",
    "created_at": 1795576167,
    "in_progress_at": 1795576168,
    "expires_at": 1795662567,
    "finalizing_at": 1795576201,
    "cancelling_at": None,
    "completed_at": 1795576201,
    "failed_at": None,
    "expired_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 20, "completed": 20, "failed": 0},
    "usage": {
        "input_tokens": 690,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 80,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 770,
    },
    "metadata": {"team": "search"},
}

DELETED: Final[Json] = {"id": FILE["id"], "object": "file", "deleted": True}

_FORM: Final[Json] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON lines, one request per line."},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}

_ORDER: Final[Json] = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "additionalProperties": False,
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"type": "string", "enum": ["/v1/chat/completions", "/v1/completions"]},
        "completion_window": {"type": "string", "pattern": "^[1-9][0-9]{0,3}[mhd]$"},
        "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}, "maxProperties": 16},
        "output_expires_after": {
            "type": ["object", "null"],
            "required": ["anchor", "seconds"],
            "properties": {
                "anchor": {"type": "string", "enum": ["created_at"]},
                "seconds": {"type": "integer", "minimum": 3600, "maximum": 2592000},
            },
        },
        "compare_plain": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_COMPARED_REQUESTS},
    },
}

UPLOAD_BODY: Final[Json] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": named("Upload", _FORM)}}}
}
ORDER_BODY: Final[Json] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": named("BatchOrder", _ORDER), "example": ORDER}},
    },
    "parameters": [IDEMPOTENCY],
}
BYTES: Final[dict[int | str, Json]] = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    404: {"model": ErrorReply, "description": "Unknown file id."},
}


def replies(model: type, example: Json, *errors: int) -> dict[int | str, Json]:
    """Return the `responses` of a route: its model with an example, and its error statuses."""
    envelope = {
        "error": {
            "message": "Why the request is invalid.",
            "type": "invalid_request_error",
            "param": "id",
            "code": None,
        }
    }
    done = {"model": model, "description": "Done.", "content": {"application/json": {"example": example}}}
    found: dict[int | str, Json] = {200: done}
    for status in errors:
        found[status] = {
            "model": ErrorReply,
            "description": _ERRORS[status],
            "content": {"application/json": {"example": envelope}},
        }
    return found


def page_of(item: Json) -> Json:
    """Return a list response with one item."""
    return {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}


_ERRORS: Final[dict[int, str]] = {
    400: "Invalid request; `param` names the field.",
    404: "Unknown id.",
    409: "Its state does not allow this.",
    413: "The file is too large.",
}
