"""Say whether a value that a schema lists is valid: `enum` with other keywords is the list of the valid values.

Formats are not evaluated: JSON Schema makes them annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

from jobs.grammar.negation import ASSERTIONS
from jobs.grammar.numbers import is_number
from jobs.grammar.references import References
from jobs.grammar.trial import is_found

_MAX_DEPTH: Final = 20
_TYPES: Final[dict[str, Callable[[Any], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: is_number(value),
    "integer": lambda value: is_number(value) and float(value).is_integer(),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class NotEvaluated(Exception):
    """A keyword that is not evaluated here."""


def equal(first: Any, second: Any) -> bool:
    """Return whether two values are equal in JSON, where 1 is 1.0 but not true."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


def is_valid(value: Any, schema: Any, document: References, depth: int = 0) -> bool:
    """Return whether a value is valid; raise NotEvaluated if that is not known, or depends on the draft."""
    document.step()
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict) or depth > _MAX_DEPTH or ("$ref" in schema and len(ASSERTIONS & schema.keys()) > 1):
        raise NotEvaluated

    def inner(part: Any, each: Any = value) -> bool:
        return is_valid(each, part, document, depth + 1)

    try:
        return all(_holds(name, schema, value, inner, document) for name in schema if name in ASSERTIONS)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as exc:  # a broken schema
        raise NotEvaluated from exc


def _holds(name: str, schema: dict[str, Any], value: Any, inner: Callable[..., bool], document: References) -> bool:
    given = schema[name]
    match name:
        case "format" | "then" | "else":
            return True
        case "type":
            return any(_TYPES[each](value) for each in ([given] if isinstance(given, str) else given))
        case "const":
            return equal(value, given)
        case "enum":
            return any(equal(value, each) for each in given)
        case "$ref":
            return inner(document.find(given))
        case "allOf":
            return all(inner(part) for part in given)
        case "anyOf":
            return any(inner(part) for part in given)
        case "oneOf":
            return sum(inner(part) for part in given) == 1
        case "not":
            return not inner(given)
        case "if":
            return inner(schema.get("then" if inner(given) else "else", True))
    if is_number(value):
        return _number_holds(name, given, value)
    if isinstance(value, str):
        return _string_holds(name, given, value)
    if isinstance(value, list):
        return _array_holds(name, schema, value, inner)
    return not isinstance(value, dict) or _object_holds(name, schema, value, inner)


def _number_holds(name: str, given: Any, value: float) -> bool:
    match name:
        case "minimum":
            return bool(value >= given)
        case "maximum":
            return bool(value <= given)
        case "exclusiveMinimum" | "exclusiveMaximum":
            if isinstance(given, bool):
                raise NotEvaluated
            return bool(value > given if name == "exclusiveMinimum" else value < given)
        case "multipleOf":
            return Fraction(value) % Fraction(given) == 0
    return True


def _count_holds(name: str, given: int, count: int) -> bool:
    return count >= given if name.startswith("min") else count <= given


def _string_holds(name: str, given: Any, value: str) -> bool:
    match name:
        case "minLength" | "maxLength":
            return _count_holds(name, given, len(value))
        case "pattern":
            return _is_found(given, value)
    return True


def _is_found(pattern: str, text: str) -> bool:
    if not text.isascii() or "\n" in text:
        raise NotEvaluated  # the dialects differ there
    return is_found(pattern, text)


def _array_holds(name: str, schema: dict[str, Any], value: list[Any], inner: Callable[..., bool]) -> bool:
    given = schema[name]
    match name:
        case "minItems" | "maxItems":
            return _count_holds(name, given, len(value))
        case "uniqueItems":
            return not given or not any(equal(a, b) for n, a in enumerate(value) for b in value[:n])
        case "prefixItems":
            return all(map(inner, given, value))
        case "items" if not isinstance(given, list):
            return all(inner(given, each) for each in value[len(schema.get("prefixItems", [])) :])
        case "contains" if not {"minContains", "maxContains"} & schema.keys():
            return any(inner(given, each) for each in value)
        case "items" | "contains" | "additionalItems" | "unevaluatedItems":
            raise NotEvaluated
    return True


def _object_holds(name: str, schema: dict[str, Any], value: dict[str, Any], inner: Callable[..., bool]) -> bool:
    given = schema[name]
    match name:
        case "minProperties" | "maxProperties":
            return _count_holds(name, given, len(value))
        case "required":
            return all(each in value for each in given)
        case "properties":
            return all(inner(part, value[each]) for each, part in given.items() if each in value)
        case "patternProperties":
            return all(
                inner(part, each) for rule, part in given.items() for key, each in value.items() if _is_found(rule, key)
            )
        case "additionalProperties":
            named, rules = schema.get("properties", {}), schema.get("patternProperties", {})
            others = (key for key in value if key not in named and not any(_is_found(rule, key) for rule in rules))
            return all(inner(given, value[key]) for key in others)
        case "propertyNames":
            return all(inner(given, key) for key in value)
        case "dependencies" | "dependentRequired" | "dependentSchemas" | "unevaluatedProperties":
            raise NotEvaluated
    return True
