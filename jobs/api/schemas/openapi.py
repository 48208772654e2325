"""Complete the OpenAPI document: request bodies, query parameters and security, which FastAPI can't derive.

The routes parse their bodies themselves; nothing is validated against these schemas. Field names come from the parser.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, get_args

from fastapi import FastAPI

from jobs.api.schemas.replies import ErrorReply
from jobs.api.schemas.route_responses import examples, streamed_schemas
from jobs.messages import (
    CHAT_ENDPOINT,
    MAX_COMPARED_REQUESTS,
    MAX_STOP_STRINGS,
    Endpoint,
    Priority,
    SamplingParameters,
)
from jobs.submission.carried import MAX_KEPT_VALUES
from jobs.submission.fields import PARAMETERS, Treatment, field_of
from jobs.submission.managed.fields import MAX_CONCURRENT, MAX_NAME_CHARS
from jobs.submission.managed.pilot import MAX_PILOT_REQUESTS
from jobs.submission.parameters.identity import IDENTITY_SEED
from jobs.submission.parameters.tools import MAX_TOOLS
from jobs.submission.request_parser import MAX_CUSTOM_ID_CHARS, MAX_TIMEOUT_S
from storage.webhooks import EVENT_TYPES

Json = dict[str, Any]


ERRORS: dict[int | str, Json] = {
    "4XX": {"model": ErrorReply, "description": "The request is wrong; the error says what to change."},
    "5XX": {"model": ErrorReply, "description": "The service is unavailable or has failed."},
}
TAGS: Final[list[Json]] = [
    {"name": "jobs", "description": "Submit prompts, follow their progress, fetch outputs."},
    {"name": "files", "description": "Input and output files of batches, compatible with OpenAI."},
    {"name": "uploads", "description": "Files in parts, compatible with OpenAI, that continue after an interruption."},
    {"name": "batches", "description": "Jobs created from a file, compatible with OpenAI."},
    {"name": "completions", "description": "Single requests, answered at once, compatible with OpenAI."},
    {"name": "responses", "description": "Single requests in the format of OpenAI's Responses API."},
    {"name": "webhooks", "description": "Calls when jobs end, compatible with OpenAI and Standard Webhooks."},
    {"name": "verifications", "description": "Compute a sample of a job again, and sign what was found."},
    {"name": "service", "description": "Models, workers, statistics, health."},
]
_KEY: Final = "key"  # the name of the security scheme
_SCHEMAS: Final[Json] = {}  # of request bodies, by name

_TEXT: Final[Json] = {"type": "string", "minLength": 1}
_WINDOW: Final[Json] = {"type": "string", "pattern": "^[1-9][0-9]{0,3}[mhd]$", "description": "For example 24h or 30m."}
_ENDPOINT: Final[Json] = {"type": "string", "enum": list(get_args(Endpoint))}


def _parameters() -> Json:
    """Return the schemas of all PARAMETERS; those of sampling parameters come from their model."""
    schemas: Json = {name: {"description": _described(name)} for name in PARAMETERS}
    for name, schema in SamplingParameters.model_json_schema()["properties"].items():
        schemas[name] = {key: value for key, value in schema.items() if key not in ("title", "default")}
        idle = [value for value in field_of(name, CHAT_ENDPOINT).idle if type(value) is int]
        if idle and "minimum" in schemas[name]:
            schemas[name]["minimum"] = min(*idle, schemas[name]["minimum"])
    schemas["stop"] = {
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOP_STRINGS}],
        "description": schemas["stop"]["description"],
    }
    schemas["seed"] = {
        "anyOf": [{k: v for k, v in schemas["seed"].items() if k != "description"}, {"const": IDENTITY_SEED}],
        "description": schemas["seed"]["description"],
    }
    schemas["cache"] |= {"type": "boolean"}
    schemas["max_completion_tokens"] = {**schemas["max_tokens"], "description": "Same as max_tokens; takes precedence."}
    schemas["logprobs"] = {
        "anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 20}],
        "description": "Chats: return log-probabilities. Completions: for how many of the most likely tokens.",
    }
    schemas["top_logprobs"] = {
        "type": "integer",
        "minimum": 0,
        "maximum": 20,
        "description": "Chats with logprobs: number of most likely tokens.",
    }
    schemas["tools"] |= {"type": "array", "items": {"type": "object"}, "maxItems": MAX_TOOLS}
    schemas["parallel_tool_calls"] |= {"type": "boolean"}
    return {name: schemas[name] for name in sorted(PARAMETERS)}


def _described(name: str) -> str:
    field = field_of(name, CHAT_ENDPOINT)
    if field.treatment is Treatment.DROPPED:
        return f"Accepted and ignored. {field.meaning}"
    return field.meaning if field.treatment is Treatment.HONOURED else f"Leave it out. {field.meaning}"


def _optional(schema: Json) -> Json:
    """Return the schema of an optional field: missing and null mean the same."""
    variants = schema.get("anyOf")
    if schema.keys() <= {"description"} or (variants and {"type": "null"} in variants):
        return schema
    described = {key: value for key, value in schema.items() if key == "description"}
    own = variants or [{key: value for key, value in schema.items() if key != "description"}]
    return {"anyOf": [*own, {"type": "null"}], **described}


def _object(title: str, required: list[str], properties: Json, *, open_ended: bool = False) -> Json:
    """Register the schema of an object and return a reference to it."""
    fields = {name: schema if name in required else _optional(schema) for name, schema in properties.items()}
    needed = {"required": required} if required else {}
    return _named(title, {"type": "object", "properties": fields, "additionalProperties": open_ended, **needed})


def _named(title: str, schema: Json) -> Json:
    """Register a schema under its name and return a reference to it."""
    _SCHEMAS[title] = {"title": title, **schema}
    return {"$ref": f"#/components/schemas/{title}"}


_PARAMETERS: Final = _parameters()
_METADATA: Final[Json] = {
    "type": "object",
    "maxProperties": 16,
    "additionalProperties": {"type": "string", "maxLength": 512},
    "description": "Your own data; returned with the job.",
}
_MANAGED: Final[Json] = {
    "name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "description": "Name of the job."},
    "labels": {**_METADATA, "description": "Labels to find the job by; the same pairs as metadata."},
    "priority": {"type": "string", "enum": list(Priority), "description": "Which waiting jobs run first."},
    "budget": {
        "type": "object",
        "properties": {
            "tokens": {"type": ["integer", "null"], "minimum": 1},
            "seconds": {"type": ["number", "null"], "exclusiveMinimum": 0},
        },
        "additionalProperties": False,
        "description": "Prompt and completion tokens, or seconds without pauses, after which the job pauses.",
    },
    "max_concurrent": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_CONCURRENT,
        "description": "Maximum number of its requests that run at once.",
    },
}
_CHANGES: Final = _object(
    "JobChanges",
    [],
    _MANAGED
    | {
        "labels": {
            "type": "object",
            "additionalProperties": {"type": ["string", "null"], "maxLength": 512},
            "description": "Labels to set; null removes one. Others stay.",
        }
    },
)
_PART: Final = _object("ContentPart", ["type", "text"], {"type": {"type": "string", "enum": ["text"]}, "text": _TEXT})
_CALL_SHAPE: Final = _object(
    "MessageToolCall",
    ["id", "function"],
    {
        "id": _TEXT,
        "type": {"type": "string", "enum": ["function"]},
        "function": _object(
            "CalledFunction", ["name"], {"name": _TEXT, "arguments": {"type": "string"}}, open_ended=True
        ),
    },
    open_ended=True,
)
_MESSAGE: Final = _object(
    "Message",
    ["role", "content"],
    {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}],
            "description": "Null is the empty text, but not in user and tool messages.",
        },
        "name": {"type": "string", "description": "Accepted and ignored."},
        "refusal": {"description": "Accepted and ignored."},
        "tool_calls": {"type": "array", "items": _CALL_SHAPE, "description": "Of an assistant: its calls."},
        "tool_call_id": {"type": "string", "description": "Of a tool message: the call that it answers."},
    },
    open_ended=True,  # an answer sent back as history has more, empty fields
)
_MESSAGES: Final[Json] = {"type": "array", "minItems": 1, "items": _MESSAGE}
_TOKEN_IDS: Final[Json] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT: Final[Json] = {
    "anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, {"type": "integer"}, _TOKEN_IDS]}}],
    "description": "A text; for /v1/completions also a list of texts, or token ids.",
}
_ITEMS: Final[Json] = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_INPUT: Final[Json] = {
    "input": {"anyOf": [{"type": "string"}, _ITEMS], "description": "On /v1/responses: a text, or items."},
    "instructions": {"type": "string", "description": "On /v1/responses: a system message before the conversation."},
    "previous_response_id": {"type": "string", "description": "On /v1/responses: continue its conversation."},
}
_ID: Final[Json] = {"type": ["string", "integer"], "minLength": 1, "maxLength": MAX_CUSTOM_ID_CHARS}
_KEEP: Final[Json] = {
    "type": "object",
    "maxProperties": MAX_KEPT_VALUES,
    "description": "Your own values, such as a label: returned with the output.",
}
_REQUEST: Final = _object(
    "JobRequest",
    [],
    {
        **_PARAMETERS,
        "custom_id": {**_ID, "description": "Your name of the request; unique in the job."},
        "id": {**_ID, "description": "Alias of custom_id."},
        "prompt": _PROMPT,
        "messages": _MESSAGES,
        **_INPUT,
        "model": _TEXT,
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
        "keep": _KEEP,
    },
)
_LINE: Final = _object(
    "BatchLine",
    ["body"],
    {
        "custom_id": _ID,
        "id": _ID,
        "method": {"type": "string", "enum": ["POST"]},
        "url": _ENDPOINT,
        "body": {"type": "object"},
        "keep": _KEEP,
    },
)
_REQUESTS: Final[Json] = {
    "type": "array",
    "minItems": 1,
    "items": {"anyOf": [_TEXT, _REQUEST, _LINE]},
    "description": "Prompts: texts, objects with prompt or messages, or lines of an OpenAI batch file.",
}
_JOB: Final[Json] = {
    "model": {**_TEXT, "description": "Default: the model of the first request, else the served model."},
    "endpoint": _ENDPOINT,
    "metadata": _METADATA,
    **_MANAGED,
    "completion_window": _WINDOW,
    "parameters": _object("Parameters", [], _PARAMETERS),
    "compare_plain": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_COMPARED_REQUESTS,
        "description": "Number of requests to decode again, with and without drafts, after the job completes.",
    },
    "pilot": {
        "anyOf": [
            {"type": "boolean"},
            {"type": "integer", "minimum": 1, "maximum": MAX_PILOT_REQUESTS},
            {"type": "object", "properties": {"requests": {"type": "integer"}, "seed": {"type": "integer"}}},
        ],
        "description": "Requests that run first; then the job pauses and can be estimated. True: a hundredth.",
    },
}
_SUBMISSION: Final = _object(
    "JobSubmission",
    [],
    {
        **_PARAMETERS,
        **_JOB,
        "requests": _REQUESTS,
        "prompts": {**_REQUESTS, "description": "Alias of requests; send one of the two."},
        "input_file_id": {"type": "string", "description": "In place of requests: an uploaded file with one a line."},
    },
)
_RESPONSE_PARAMETERS: Final[Json] = {
    "max_output_tokens": {**_PARAMETERS["max_tokens"], "description": "Cap of the answer, its reasoning included."},
    "text": {"type": "object", "description": "format: text, json_object or json_schema."},
    "include": {"type": "array", "items": {"type": "string"}, "description": "message.output_text.logprobs"},
    "background": {"type": "boolean", "description": "Answer at once, and generate as a job."},
    "store": {"type": "boolean", "description": "False: the response can't be retrieved later."},
    "metadata": _METADATA,
}
_CALL: Final[Json] = {
    **_PARAMETERS,
    "model": _TEXT,
    "stream": {"type": "boolean", "description": "Stream the answer as server-sent events."},
    "stream_options": _object("StreamOptions", [], {"include_usage": {"type": "boolean"}}, open_ended=True),
}
_CHAT: Final = _object("ChatCall", ["model", "messages"], {**_CALL, "messages": _MESSAGES})
_COMPLETION: Final = _object("CompletionCall", ["model", "prompt"], {**_CALL, "prompt": _PROMPT})
_RESPONSE: Final = _object("ResponseCall", ["model", "input"], {**_CALL, **_RESPONSE_PARAMETERS, **_INPUT})

_IDEMPOTENCY: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "A repeated submission with the same key returns the first job.",
}
_TRACEPARENT: Final[Json] = {
    "name": "traceparent",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "W3C trace context; the spans of the job join this trace.",
}


def _query_parameters() -> list[Json]:
    """Return the job's fields and parameters as query parameters, for JSON lines bodies. Objects are JSON text."""
    fields = {name: schema for name, schema in {**_PARAMETERS, **_JOB}.items() if schema.keys() - {"description"}}
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": _query_schema(schema),
            "description": f"{schema.get('description', '')} For JSON lines bodies; lists and objects as JSON.".strip(),
        }
        for name, schema in {**fields, "parameters": {"type": "object"}}.items()
    ]


def _query_schema(schema: Json) -> Json:
    """Return the schema of a query parameter: the field's own for a scalar, else a string."""
    variants = [variant for variant in schema.get("anyOf", [schema]) if variant != {"type": "null"}]
    scalar = len(variants) == 1 and variants[0].get("type") in ("string", "integer", "number", "boolean")
    return {key: value for key, value in variants[0].items() if key != "description"} if scalar else {"type": "string"}


def _body(schema: Json, examples: Json, *parameters: Json, **others: Json) -> Json:
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": shown}, **others}
    return {"requestBody": {"required": True, "content": content}, "parameters": [*parameters, _TRACEPARENT]}


_LINES: Final[Json] = {"schema": {"type": "string"}, "example": '"Name two rivers."\n"Say hello."\n'}
JOB_BODY: Final = _body(
    _SUBMISSION,
    {
        "prompts": {"prompts": ["Name two rivers."], "max_tokens": 40, "temperature": 0},
        "requests": {"requests": ["Name two rivers.", {"custom_id": "b", "prompt": "Hello."}], "max_tokens": 40},
    },
    *_query_parameters(),
    _IDEMPOTENCY,
    **{"application/x-ndjson": _LINES, "application/jsonl": _LINES, "application/x-jsonlines": _LINES},
)
CHANGES_BODY: Final = _body(_CHANGES, {"labels": {"name": "Nightly summary", "labels": {"team": "search"}}})
VERIFICATION_BODY: Final = _body(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "sample": {
                "type": ["string", "integer"],
                "description": "A share of the completed requests such as 1%, the default, or their number.",
            }
        },
    },
    {"share": {"sample": "1%"}, "number": {"sample": 20}},
    _IDEMPOTENCY,
)
CHAT_BODY: Final = _body(
    _CHAT,
    {"chat": {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Name two rivers."}]}},
)
COMPLETION_BODY: Final = _body(
    _COMPLETION, {"text": {"model": "smollm2-135m-instruct", "prompt": "The river runs", "max_tokens": 16}}
)
RESPONSE_BODY: Final = _body(_RESPONSE, {"text": {"model": "smollm2-135m-instruct", "input": "Name two rivers."}})

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
        "endpoint": _ENDPOINT,
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
        **{name: _optional(schema) for name, schema in _MANAGED.items()},
    },
}
_ORDER_EXAMPLE: Final[Json] = {
    "input_file_id": "file-0279686e3beef124974af6614f487747",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
    "metadata": {"team": "search"},
}
UPLOAD_BODY: Final[Json] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _named("Upload", _FORM)}}}
}
_PARTED: Final[Json] = {
    "type": "object",
    "required": ["filename", "purpose", "bytes"],
    "additionalProperties": False,
    "properties": {
        "filename": {"type": "string", "minLength": 1, "maxLength": 255},
        "purpose": {"type": "string", "enum": ["batch"]},
        "bytes": {"type": "integer", "minimum": 1},
        "mime_type": {"type": ["string", "null"]},
        "expires_after": _ORDER["properties"]["output_expires_after"],
    },
}
_COMPLETE: Final[Json] = {
    "type": "object",
    "required": ["part_ids"],
    "additionalProperties": False,
    "properties": {
        "part_ids": {"type": "array", "minItems": 1, "items": {"type": "string"}},
        "md5": {"type": ["string", "null"], "pattern": "^[0-9a-fA-F]{32}$"},
    },
}
_PART_FORM: Final[Json] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary", "description": "The bytes of the part."}},
}
PARTED_UPLOAD_BODY: Final[Json] = _body(
    _named("PartedUpload", _PARTED), {"upload": {"filename": "batch.jsonl", "purpose": "batch", "bytes": 437}}
)
PART_BODY: Final[Json] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _named("Part", _PART_FORM)}}}
}
COMPLETE_BODY: Final[Json] = _body(
    _named("UploadCompletion", _COMPLETE), {"parts": {"part_ids": ["part_0279686e3beef124974af6614f487747"]}}
)
_EVENT_TYPE: Final[Json] = {"type": "string", "enum": list(EVENT_TYPES)}
_ENDPOINT_FIELDS: Final[Json] = {
    "name": {"type": "string", "maxLength": 256},
    "url": {"type": "string", "maxLength": 2048, "description": "A public https URL."},
    "event_types": {"type": "array", "minItems": 1, "items": _EVENT_TYPE},
}
_OF_JOBS: Final[Json] = {
    "job_id": {"type": "string", "description": "Only of this job; default: of all jobs of the key."},
    "all_keys": {"type": "boolean", "description": "Of the jobs of all keys; needs the scope admin."},
}
_KEEP_SECRET: Final[Json] = {"keep_old_secret_active_for_24_hours": {"type": "boolean"}}
_A_WEBHOOK: Final[Json] = {"name": "nightly", "url": "https://example.com/hook", "event_types": ["batch.completed"]}
WEBHOOK_BODY: Final[Json] = _body(
    _object("WebhookEndpoint", ["url", "event_types"], _ENDPOINT_FIELDS | _OF_JOBS), {"nightly": _A_WEBHOOK}
)
WEBHOOK_CHANGE_BODY: Final[Json] = _body(
    _object("WebhookEndpointChange", [], _ENDPOINT_FIELDS), {"name": {"name": "nightly"}}
)
WEBHOOK_SECRET_BODY: Final[Json] = _body(
    _object("WebhookSecretRotation", [], _KEEP_SECRET), {"rotation": {next(iter(_KEEP_SECRET)): True}}
)
WEBHOOK_TEST_BODY: Final[Json] = _body(
    _object("WebhookTest", [], {"event_type": _EVENT_TYPE}), {"test": {"event_type": "batch.completed"}}
)
BATCH_BODY: Final[Json] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _named("BatchOrder", _ORDER), "example": _ORDER_EXAMPLE}},
    },
    "parameters": [_IDEMPOTENCY],
}


_SCHEME: Final[Json] = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, created with `basic keys create`. Not needed until the first key is created.",
}


def install(app: FastAPI) -> None:
    """Install the completed document. FastAPI's 422 is removed: an invalid request gets 400."""
    make = app.openapi

    @cache
    def openapi() -> Json:
        document = make()
        document["tags"] = TAGS
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path.startswith("/v1"):
                    operation["security"] = [{_KEY: []}, {}]
        document["components"]["schemas"] |= streamed_schemas() | _SCHEMAS
        for name, example in examples().items():  # FastAPI drops null fields of examples; clients rely on them
            document["components"]["schemas"][name]["example"] = example
        document["components"]["securitySchemes"] = {_KEY: _SCHEME}
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
