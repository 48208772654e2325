"""Build the lines of output and error files in the format of OpenAI's Batch API.

Deterministic: the same rows give the same bytes, so that a file can be written twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.json_lines import one_line
from jobs.messages import CHAT_ENDPOINT, GenerationRequest
from jobs.openai import completions
from jobs.openai.completions import ResponseHeader
from jobs.openai.errors import error_body
from jobs.openai.response_items import response_id
from jobs.openai.response_object import StoredResponse, response_object
from storage.batches import BatchClaim
from storage.queries import OutputView

Json = dict[str, Any]


def result_line(batch: BatchClaim, view: OutputView, body: Mapping[str, Any] | None = None) -> bytes:
    """Return the line of an ended request, for the output file if it completed, else for the error file.

    `body` is the stored request, of which a Response object repeats parts.
    """
    name = hashlib.sha256(f"{batch.job_id}:{view.request_index}".encode()).hexdigest()[:24]
    line = {"id": f"batch_req_{name}", "custom_id": view.custom_id, **_result(batch, view, name, body)}
    return one_line(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))).encode() + b"\n"


def _result(batch: BatchClaim, view: OutputView, name: str, body: Mapping[str, Any] | None) -> Json:
    """Return `response` and `error` of a line: a request that never ran (expired, cancelled) has no response."""
    if view.status == "completed":
        answer = completions.answer(_header(batch, view, name), view) if body is None else _object(batch, view, body)
        return {"response": _response(name, 200, answer), "error": None}
    message = view.error_message or "The request has no result."
    if view.status != "failed":
        return {"response": None, "error": {"code": view.error_code, "message": message}}
    status_code = view.error_status_code or 500
    error = error_body(status_code, message, view.error_param, view.error_code)
    return {"response": _response(name, status_code, error), "error": None}


def _object(batch: BatchClaim, view: OutputView, body: Mapping[str, Any]) -> Json:
    """Return the Response object of a completed request of /v1/responses."""
    identity, started_at = response_id(batch.job_id, view.request_index), view.choices[0].started_at
    stored = StoredResponse(identity, batch.model, started_at, GenerationRequest.model_validate(body))
    return response_object(stored, view.status, view)


def _header(batch: BatchClaim, view: OutputView, name: str) -> ResponseHeader:
    kind = "chatcmpl" if batch.endpoint == CHAT_ENDPOINT else "cmpl"
    created = int(max(choice.finished_at for choice in view.choices))
    return ResponseHeader(f"{kind}-{name}", batch.endpoint, batch.model, created, batch.job_id)


def _response(name: str, status_code: int, body: Json) -> Json:
    return {"status_code": status_code, "request_id": f"req_{name}", "body": body}
