"""Read keywords of a JSON schema: types, counts, strings, fixed values; and name the place of one that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from jobs.errors import InvalidValue, RequestRefused, UnsupportedParameter
from jobs.grammar.formats import format_patterns
from jobs.grammar.numbers import exact_number
from jobs.grammar.patterns import search_patterns

MAX_VALUES: Final = 5_000  # of one enum
MAX_MINIMUM: Final = 100_000  # of characters, items or properties: longer answers fit no context
_MAX_MAXIMUM: Final = 10**9  # no text reaches it
_TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")
_CONTROLS: Final = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")  # JSON writes them as \u…, which grammars don't allow


class Misplaced(Exception):
    """A refusal whose place is known."""

    def __init__(self, refused: RequestRefused) -> None:
        super().__init__(refused)
        self.refused = refused


@contextmanager
def at(*place: str) -> Iterator[None]:
    """Raise Misplaced for what is refused inside, with its place in the schema as the field."""
    try:
        yield
    except RequestRefused as refused:
        where = ".".join((*place, *([refused.param] if refused.param else [])))
        raise Misplaced(type(refused)(refused.message, param=where)) from refused


def type_keyword(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `type`, checked."""
    if "type" not in schema:
        return {}
    given = schema["type"]
    types = given if isinstance(given, list) and given else [given]
    for name in types:
        if not isinstance(name, str) or name not in _TYPES:
            raise InvalidValue(f"must be one of {', '.join(_TYPES)}, not {str(name)[:40]!r}", param="type")
    return {"type": types[0] if len(types) == 1 else types}


def count_keyword(schema: Mapping[str, Any], name: str) -> dict[str, int]:
    """Return a limit on a number of characters, items or properties."""
    if name not in schema:
        return {}
    count = schema[name]
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if type(count) is not int or count < 0:
        raise InvalidValue("must be a whole number of at least 0", param=name)
    if name.startswith("max"):
        return {name: count} if count <= _MAX_MAXIMUM else {}
    if count > MAX_MINIMUM:
        raise InvalidValue(f"must be at most {MAX_MINIMUM}: longer answers fit no context", param=name)
    return {name: count} if count else {}


def string_keywords(schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the lengths of strings, and the patterns that all must match, in llguidance's syntax."""
    found = count_keyword(schema, "minLength") | count_keyword(schema, "maxLength")
    patterns: list[str] = []
    if "pattern" in schema:
        patterns += searched(schema["pattern"], "pattern")
    if "format" in schema:
        patterns += format_patterns(schema["format"], schema)
    return found, [f"^{pattern}$" for pattern in patterns]


def searched(pattern: Any, name: str) -> tuple[str, ...]:
    """Return the translation of a pattern of the schema; raise RequestRefused with the field `name`."""
    if not isinstance(pattern, str):
        raise InvalidValue("must be a string", param=name)
    try:
        return search_patterns(pattern)
    except (InvalidValue, UnsupportedParameter) as refused:
        raise type(refused)(refused.message, param=name) from refused


def values_keywords(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return `const` and `enum` with values that JSON writes in one way."""
    found: dict[str, Any] = {}
    if "const" in schema:
        found["const"] = _fixed(schema["const"], "const")
    if "enum" in schema:
        values = listed(schema["enum"], "enum")
        if not values:
            raise InvalidValue("must have at least one value", param="enum")
        if len(values) > MAX_VALUES:
            raise InvalidValue(f"must have at most {MAX_VALUES} values, not {len(values)}", param="enum")
        found["enum"] = [_fixed(value, "enum") for value in values]
    return found


def listed(value: Any, name: str | None = None) -> list[Any]:
    """Return a list; raise InvalidValue for other values."""
    if not isinstance(value, list):
        raise InvalidValue("must be a list", param=name)
    return value


def writable(text: str, name: str | None = None) -> str:
    """Return a fixed text; raise UnsupportedParameter for control characters."""
    if (control := _CONTROLS.search(text)) is not None:
        raise UnsupportedParameter(
            f"The control character U+{ord(control[0]):04X} in a fixed text can't be held.", param=name
        )
    return text


def _fixed(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return writable(value, name)
    if isinstance(value, list):
        return [_fixed(each, name) for each in value]
    if isinstance(value, dict):
        return {writable(key, name): _fixed(each, name) for key, each in value.items()}
    if value is None or isinstance(value, bool):
        return value
    try:
        return exact_number(value)
    except InvalidValue as refused:
        raise InvalidValue(refused.message, param=name) from refused
