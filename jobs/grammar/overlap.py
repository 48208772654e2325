"""Say whether two rewritten schemas certainly have no value in common, so that `oneOf` is `anyOf`."""

from __future__ import annotations

from typing import Any

_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_MAX_DEPTH = 12


def disjoint(first: Any, second: Any, depth: int = 0) -> bool:
    """Return True if no value is valid for both schemas; False if that is not certain."""
    if first is False or second is False:
        return True
    if first is True or second is True or depth > _MAX_DEPTH:
        return False
    for one, other in ((first, second), (second, first)):
        if any(disjoint(part, other, depth + 1) for part in one.get("allOf", [])):
            return True
        if "anyOf" in one and all(disjoint(part, other, depth + 1) for part in one["anyOf"]):
            return True
    common = _types(first) & _types(second)
    values = [_values(each) for each in (first, second)]
    if values[0] is not None and values[1] is not None:
        return not any(_equal(a, b) for a in values[0] for b in values[1])
    return not common or (common == {"object"} and _disjoint_objects(first, second, depth))


def _disjoint_objects(first: dict[str, Any], second: dict[str, Any], depth: int) -> bool:
    names = {*first.get("required", []), *second.get("required", [])}
    return any(disjoint(_property(first, name), _property(second, name), depth + 1) for name in names)


def _property(schema: dict[str, Any], name: str) -> Any:
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    named = _TYPES if given is None else {given} if isinstance(given, str) else given
    types = frozenset("number" if name == "integer" else name for name in named)
    values = _values(schema)
    return types if values is None else types & {_type_of(value) for value in values}


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """Return all values that may be valid, if they are listed."""
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) and _type_of(a) == _type_of(b)
