"""What a text must be, as the client takes it: a class that pydantic knows, a JSON schema, or a `response_format`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_origin

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from jobs.errors import AnswerUnreadable, InvalidValue
from jobs.grammar.closing import closed

# A pydantic class, a dataclass, a TypedDict, a TypeAdapter, or any other type of values; or an object.
ResponseFormat = type[Any] | TypeAdapter[Any] | Mapping[str, Any]

_FORMATS: Final = frozenset({"text", "json_object", "json_schema", "json", "regex", "structural_tag"})
_MAX_NAME_CHARS: Final = 64


def response_format(form: Any) -> dict[str, Any]:
    """Return the `response_format` of a request; raise InvalidValue for what is neither a type nor an object.

    The schema of a class leaves out what the class ignores: other properties, and repeated items of a set.
    """
    if isinstance(form, Mapping):
        return dict(form) if form.get("type") in _FORMATS else _of_schema("answer", dict(form))
    name = getattr(form, "__name__", "answer")
    try:
        adapter = adapter_of(form)
        if adapter is not None:
            return _of_schema(name[:_MAX_NAME_CHARS], closed(adapter.json_schema(), keep_unique=False))
    except PydanticUserError as exc:
        raise InvalidValue(f"{name} has no JSON schema: {exc.message}", param="response_format") from exc
    what = f"a value of type {type(form).__name__}"
    raise InvalidValue(f"must be a class, a TypeAdapter or an object, not {what}", param="response_format")


def schema_file(path: Path) -> dict[str, Any]:
    """Return the `response_format` of a file that holds a JSON schema or a response_format; raise InvalidValue."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise InvalidValue(f"{path} is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise InvalidValue(f"{path} holds no JSON schema: a schema is an object.")
    return response_format(content)


def adapter_of(form: Any) -> TypeAdapter[Any] | None:
    """Return what reads values of a type; None if `form` is no type. Raises PydanticUserError for others' types."""
    if isinstance(form, TypeAdapter):
        return form
    is_type = isinstance(form, type) or get_origin(form) is not None
    return TypeAdapter(form) if is_type else None


def read_answer(text: str, finish_reason: str, adapter: TypeAdapter[Any] | None) -> Any:
    """Return the value of an answer: of the adapter's type, or as JSON values without one. Raise AnswerUnreadable."""
    try:
        return json.loads(text) if adapter is None else adapter.validate_json(text)
    except (ValueError, RecursionError) as exc:  # pydantic's ValidationError is a ValueError
        if finish_reason == "length":
            raise AnswerUnreadable(
                "The answer was cut by max_tokens or the context before its JSON was complete; allow more tokens."
            ) from exc
        why = exc.errors(include_url=False)[0]["msg"] if isinstance(exc, ValidationError) else str(exc)
        raise AnswerUnreadable(f"The answer has not the expected form: {why}.") from exc


def _of_schema(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
