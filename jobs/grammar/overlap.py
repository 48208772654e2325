"""Say whether two schemas certainly have no value in common, so that `oneOf` is `anyOf`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from jobs.errors import RequestRefused
from jobs.grammar.evaluation import NotEvaluated, is_valid
from jobs.grammar.negation import ASSERTIONS
from jobs.grammar.numbers import is_number
from jobs.grammar.references import References, TooManySteps

_TYPES: Final = frozenset({"null", "boolean", "number", "string", "array", "object"})
_OF_OBJECTS: Final = frozenset(
    {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"}
)
_MAX_DEPTH: Final = 8
_MAX_PARTS: Final = 200

Parts = Sequence[Any]  # schemas that all must hold


def disjoint(first: Any, second: Any, document: References) -> bool:
    """Return True if no value is valid for both schemas; False if that is not certain."""
    try:
        return _disjoint([first], [second], document, 0)
    except TooManySteps:
        raise
    except (RequestRefused, RecursionError, TypeError, KeyError, AttributeError):  # broken: refused at its place
        return False


def beyond(first: Any, second: Any, document: References) -> dict[str, Any] | None:
    """Return what a value of the first schema needs besides to be none of the second; None if that is not simple."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return None
    if all(map(_is_closed, (first, second))) and not first["properties"].keys() & second["properties"].keys():
        return {"minProperties": 1}
    shared = [name for name in sorted(_TYPES) if not disjoint({"allOf": [{"type": name}, first]}, second, document)]
    free = ASSERTIONS & second.keys() <= _OF_OBJECTS and "object" not in shared
    return {"type": sorted(_TYPES - {*shared})} if free else None


def _is_closed(schema: dict[str, Any]) -> bool:
    """Return whether the values are objects of the named properties only."""
    named = schema.get("type") == "object" and schema.get("additionalProperties") is False and "properties" in schema
    return named and ASSERTIONS & schema.keys() <= {"type", "properties", "additionalProperties", "required"}


def listed_values(schema: Any, document: References) -> list[Any] | None:
    """Return the values of which all valid ones are some, if the schema lists any in `enum` or `const`."""
    lists = [values for part in _parts([schema], document) if (values := _values(part)) is not None]
    return min(lists, key=len, default=None)


def _disjoint(first: Parts, second: Parts, document: References, depth: int) -> bool:
    document.step()
    if depth > _MAX_DEPTH:
        return False
    parts = list(_parts(first, document)), list(_parts(second, document))
    every = [*parts[0], *parts[1]]
    if False in every:
        return True
    every = [part for part in every if part is not True]
    common = _TYPES.intersection(*map(_types, every))
    if not common or _no_value_is_valid(every, document):
        return True
    for ours, others in (parts, parts[::-1]):
        for n, part in enumerate(ours):
            options = (part.get("anyOf") or part.get("oneOf")) if isinstance(part, dict) else None
            if options and all(_disjoint([option, *ours[:n]], others, document, depth + 1) for option in options):
                return True
    return common == {"object"} and _disjoint_objects(parts[0], parts[1], document, depth)


def _disjoint_objects(first: Parts, second: Parts, document: References, depth: int) -> bool:
    names = {name for part in (*first, *second) if isinstance(part, dict) for name in part.get("required", [])}
    return any(_disjoint(_property(first, name), _property(second, name), document, depth + 1) for name in names)


def _property(parts: Parts, name: str) -> list[Any]:
    """Return the schemas that a property must be valid for."""
    found = []
    for part in parts:
        if isinstance(part, dict):
            others = True if "patternProperties" in part else part.get("additionalProperties", True)
            found.append(part.get("properties", {}).get(name, others))
    return found


def _parts(schemas: Parts, document: References) -> Iterator[Any]:
    """Yield the schemas that all must hold, with those of their references and their `allOf`."""
    waiting = list(schemas)
    for _ in range(_MAX_PARTS):
        if not waiting:
            return
        part = waiting.pop(0)
        if isinstance(part, dict) and "$ref" in part:  # older drafts ignore the keywords beside it
            waiting.append(document.find(part["$ref"]))
            continue
        yield part
        waiting += part.get("allOf", []) if isinstance(part, dict) else []


def _no_value_is_valid(parts: Parts, document: References) -> bool:
    """Return True if the valid values are some of a list, and none of it is valid."""
    lists = [values for part in parts if (values := _values(part)) is not None]
    if not lists:
        return False
    try:
        return not any(is_valid(value, {"allOf": list(parts)}, document) for value in min(lists, key=len))
    except NotEvaluated:
        return False


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    named = _TYPES if given is None else {given} if isinstance(given, str) else given
    types = frozenset("number" if name == "integer" else name for name in named)
    values = _values(schema)
    return types if values is None else types & {_type_of(value) for value in values}


def _values(schema: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if is_number(value):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
