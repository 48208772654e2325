"""Parse the body of `POST /v1/jobs`: one JSON object, or JSON lines with the fields of the job in the query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import IO, Any, get_args

from starlette.datastructures import Headers, QueryParams

from jobs.api.http.body import Body
from jobs.client.durations import parse_duration_s
from jobs.errors import InvalidValue, MissingParameter, UnknownParameter, UnsupportedBody
from jobs.input_format import reject_bytes_of_other_formats
from jobs.messages import Endpoint
from jobs.openai.paths import endpoint_of_url
from jobs.settings import JobsSettings
from jobs.submission.fields import PARAMETERS
from jobs.submission.intake import Submission
from jobs.submission.items import Item, read_json, read_lines
from jobs.submission.managed.fields import MANAGED_FIELDS, Managed
from jobs.submission.values import refuse_unknown

OpenFile = Callable[[str], IO[bytes]]

_JSON_TYPES = {"application/json"}
_LINES_TYPES = {"application/x-ndjson", "application/jsonl", "application/x-jsonlines"}
_JOB_FIELDS = MANAGED_FIELDS | {
    *("model", "endpoint", "metadata", "completion_window", "parameters", "compare_plain", "pilot")
}
_TEXTS = frozenset({"model", "name"})  # never read as JSON in the query
_LISTS = frozenset({"requests", "prompts"})
IDEMPOTENCY_KEY = "idempotency-key"


def max_body_bytes(headers: Headers, settings: JobsSettings) -> int:
    """Return the size limit of a body by its content type; raise UnsupportedBody for other types.

    JSON lines are parsed one by one. A single JSON value is parsed as a whole and takes many times its size in memory.
    """
    content_type = _content_type(headers)
    if content_type in _LINES_TYPES:
        return settings.max_body_bytes
    if content_type in _JSON_TYPES:
        return min(settings.max_json_bytes, settings.max_body_bytes)
    raise UnsupportedBody


def require_json(headers: Headers) -> None:
    """Raise UnsupportedBody unless the body is declared as JSON, the type that cross-site forms can't send."""
    if _content_type(headers) not in _JSON_TYPES:
        raise UnsupportedBody("Send the body as JSON, with the header content-type: application/json.")


def read_submission(
    body: Body, query: QueryParams, headers: Headers, key_id: str, max_line_bytes: int, open_file: OpenFile
) -> Submission:
    """Return the submission; raise what is wrong with the job as a whole. Errors of single requests come later.

    `open_file` opens the file of an `input_file_id`.
    """
    file_id = None
    if _content_type(headers) in _LINES_TYPES:
        fields, items = _with_first_line(_query_fields(query), read_lines(body.open(), max_line_bytes))
    else:
        fields = json_object(body.open().read())
        items = _listed(fields, open_file, max_line_bytes)
        file_id = fields.pop("input_file_id", None)
        if file_id is not None:
            fields, items = _with_first_line(fields, items)
    submission = _submission(fields, items)
    return replace(
        submission,
        source_file_id=file_id,
        api_key_id=key_id,
        idempotency_key=headers.get(IDEMPOTENCY_KEY),
        body_sha256=_digest(body, query),
    )


def _with_first_line(fields: dict[str, Any], items: Iterator[Item]) -> tuple[dict[str, Any], Iterator[Item]]:
    """Return the fields of a job and its items. A first line of only `parameters` holds those that the query can't."""
    first = next(items, None)
    if first is None or not isinstance(first.value, dict) or first.value.keys() != {"parameters"}:
        return fields, items if first is None else chain([first], items)
    if "parameters" in fields:
        raise InvalidValue("Give the parameters in the query or in the first line, not in both.", param="parameters")
    return fields | first.value, (replace(item, index=item.index - 1) for item in items)


def _submission(fields: Mapping[str, Any], items: Iterator[Item]) -> Submission:
    refuse_unknown(fields, _JOB_FIELDS | _LISTS | PARAMETERS)
    window = fields.get("completion_window")
    return Submission(
        items=items,
        model=_model(fields.get("model")),
        endpoint=read_endpoint(fields["endpoint"]) if "endpoint" in fields else None,
        parameters=_parameters(fields),
        metadata=fields.get("metadata"),
        managed=Managed.of(fields),
        window_s=None if window is None else read_window_s(window),
        compare_plain=fields.get("compare_plain"),
        pilot=fields.get("pilot"),
    )


def _parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job's sampling parameters, from the object `parameters` (as in PromptBatch) and the top level."""
    grouped = fields.get("parameters", {})
    if not isinstance(grouped, dict):
        raise InvalidValue("must be an object of sampling parameters", param="parameters")
    refuse_unknown(grouped, PARAMETERS, "parameters.")
    # `metadata` and `priority` belong to the job here; they are also names of parameters.
    return grouped | {name: value for name, value in fields.items() if name in PARAMETERS - _JOB_FIELDS}


def json_object(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, without those that are null."""
    return {name: value for name, value in json_changes(body).items() if value is not None}


def json_changes(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, those that are null included."""
    try:
        fields = read_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as exc:
        reject_bytes_of_other_formats(body, "The body")
        raise InvalidValue(f"The body is not valid JSON: {exc}.") from exc
    if isinstance(fields, list):
        raise InvalidValue(
            "The body must be a JSON object, not a list. A job takes its requests as the field `requests`, or as JSON "
            "lines with the header content-type: application/x-ndjson."
        )
    if not isinstance(fields, dict):
        raise InvalidValue("The body must be a JSON object.")
    return fields


def _listed(fields: Mapping[str, Any], open_file: OpenFile, max_line_bytes: int) -> Iterator[Item]:
    given = [name for name in ("requests", "prompts", "input_file_id") if name in fields]
    if len(given) != 1:
        raise MissingParameter(
            "The prompts of the job are missing: send one list, `requests`, or the id of a file, `input_file_id`.",
            param="requests",
        )
    values = fields[given[0]]
    if given == ["input_file_id"]:
        if not isinstance(values, str):
            raise InvalidValue("must be a string", param="input_file_id")
        return read_lines(open_file(values), max_line_bytes)
    if not isinstance(values, list):
        raise InvalidValue("must be a list of strings or objects", param=given[0])
    return (Item(index, value) for index, value in enumerate(values))


def _query_fields(query: QueryParams) -> dict[str, Any]:
    """Return the fields of the query string, parsed as JSON where possible. The requests are in the body."""
    for name in _LISTS & query.keys():
        raise UnknownParameter("Not allowed here: the requests are the lines of the body.", param=name)
    return {name: value if name in _TEXTS else _query_value(value) for name, value in query.items()}


def _query_value(text: str) -> Any:
    try:
        return read_json(text.encode())
    except ValueError:
        return text


def _model(model: Any) -> str | None:
    if model is not None and not isinstance(model, str):
        raise InvalidValue("must be a string", param="model")
    return model


def read_endpoint(endpoint: Any) -> Endpoint:
    """Return the endpoint of the requests; raise InvalidValue if it is unknown. Azure's clients leave /v1 out."""
    found = endpoint_of_url(endpoint)
    if found is None:
        raise InvalidValue(f"must be one of {', '.join(get_args(Endpoint))}", param="endpoint")
    return found


def read_window_s(window: Any) -> float:
    """Return the seconds of a completion window such as 24h, 30m or 7d. (OpenAI allows only 24h.)"""
    try:
        return parse_duration_s(window if isinstance(window, str) else "", max_digits=4)
    except ValueError:
        raise InvalidValue("must be a number and m, h or d, such as 24h", param="completion_window") from None


def read_label(text: str) -> tuple[str, str | None]:
    """Return key and value of a label in a query; None: any value. Raise InvalidValue without a key."""
    key, given, value = text.partition("=")
    if not key:
        raise InvalidValue("must be a label such as team=search, or its key", param="label")
    return key, value if given else None


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _digest(body: Body, query: QueryParams) -> str:
    """Return a hash of body and query: a repeat under the same idempotency key has the same one."""
    digest = hashlib.sha256(body.sha256.encode())
    digest.update(repr(sorted(query.multi_items())).encode())
    return digest.hexdigest()
