"""Read what the database stores of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jobs.errors import UnreadableRequest
from jobs.messages import AnswerFormat, GenerationRequest


def read_request(body: Mapping[str, Any]) -> GenerationRequest:
    """Return a stored request. Raises UnreadableRequest, which fails the request and not the worker."""
    try:
        return GenerationRequest.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        location = ".".join(str(part) for part in first["loc"])
        raise UnreadableRequest(f"the stored request can't be read: {location}: {first['msg']}") from exc


def read_answer_format(stored: Mapping[str, Any] | None) -> AnswerFormat | None:
    """Return a stored answer format. Raises UnreadableRequest, which fails the request and not the worker."""
    try:
        return None if stored is None else AnswerFormat.model_validate(stored)
    except ValidationError as exc:
        raise UnreadableRequest("the stored answer format can't be read: a newer worker has written it") from exc
