"""The OpenAPI document: what FastAPI can't see in the routes, for they read their bodies themselves.

app -> [document].  Describes; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from jobs.api.replies import ErrorReply, streamed_schemas
from jobs.messages import MAX_COMPARED_REQUESTS

Json = dict[str, Any]


ERRORS: dict[int | str, Json] = {"default": {"model": ErrorReply, "description": "Why not."}}

_TEXT = {"type": "string", "minLength": 1}
_PARAMETERS: Json = {
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "seed": {"type": "integer"},
    "stop": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]},
}
_MESSAGE: Json = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "developer", "user", "assistant", "tool"]}, "content": _TEXT},
}
_CALL: Json = {**_PARAMETERS, "model": _TEXT, "stream": {"type": "boolean"}}


def _body(required: list[str], properties: Json, example: Json, **others: Json) -> Json:
    schema = {"type": "object", "required": required, "properties": properties}
    content = {"application/json": {"schema": schema, "example": example}, **others}
    return {"requestBody": {"required": True, "content": content}}


JOB_BODY = _body(
    ["requests"],
    {
        **_PARAMETERS,
        "requests": {"type": "array", "minItems": 1, "items": {"oneOf": [_TEXT, {"type": "object"}]}},
        "model": _TEXT,
        "metadata": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}},
        "completion_window": {"type": "string", "pattern": "^[1-9][0-9]{0,3}[mhd]$"},
        "compare_plain": {"type": "integer", "minimum": 1, "maximum": MAX_COMPARED_REQUESTS},
    },
    {"requests": ["Name two rivers.", {"custom_id": "b", "prompt": "Say hello."}], "max_tokens": 40},
    **{"application/x-ndjson": {"schema": {"type": "string"}, "example": '"Name two rivers."\n"Say hello."\n'}},
)
CHAT_BODY = _body(
    ["model", "messages"],
    {**_CALL, "messages": {"type": "array", "minItems": 1, "items": _MESSAGE}},
    {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Name two rivers."}]},
)
COMPLETION_BODY = _body(
    ["model", "prompt"], {**_CALL, "prompt": _TEXT}, {"model": "smollm2-135m-instruct", "prompt": "The river runs"}
)


def install(app: FastAPI, *shown: APIRouter) -> None:
    """Let the application's document say what it does: a request that is not valid is a 400 here, never a 422."""
    make = app.openapi

    def openapi() -> Json:
        document = make()
        _show_nulls(shown, document)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        document["components"]["schemas"] |= streamed_schemas()
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _show_nulls(routers: Iterable[APIRouter], document: Json) -> None:
    """Put examples of replies back as they are: FastAPI drops what is null, and clients index it."""
    for route in (route for router in routers for route in router.routes):
        if not isinstance(route, APIRoute):
            continue
        for status, reply in route.responses.items():
            for kind, content in reply.get("content", {}).items():
                for method in route.methods or ():
                    operation = document["paths"][route.path_format][method.lower()]
                    operation["responses"][str(status)]["content"][kind].update(content)
