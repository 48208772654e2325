"""The complement of a JSON schema, where a schema can say it: for `not`, `if` and `oneOf`.

A schema is the conjunction of its keywords, so its complement is one of the complements of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from jobs.grammar.references import References

_TYPES: Final = ("null", "boolean", "number", "string", "array", "object")
_MAX_DEPTH: Final = 20
# Keywords that say something about values; all others are annotations.
ASSERTIONS: Final = frozenset(
    (
        "$dynamicRef",
        "$recursiveRef",
        "$ref",
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "if",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "propertyNames",
        "required",
        "then",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    )
)
_LENGTHS: Final = {"Length": "string", "Items": "array", "Properties": "object"}


class NoComplement(Exception):
    """No schema says the complement."""


def complement(schema: Any, document: References, depth: int = 0) -> Any:
    """Return the schema of all values that are not valid for this one; raise NoComplement if there is none."""
    document.step()
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        raise NoComplement
    named = [keyword for keyword in schema if keyword in ASSERTIONS]
    if "$ref" in named and len(named) > 1:  # older drafts ignore the keywords beside it
        raise NoComplement
    try:
        parts = [part for keyword in named for part in _complements(keyword, schema[keyword], document, depth + 1)]
    except (TypeError, AttributeError, KeyError) as exc:  # a broken schema: refused at its place
        raise NoComplement from exc
    return _any_of(parts)


def _any_of(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else {"anyOf": parts} if parts else False


def _complements(keyword: str, value: Any, document: References, depth: int) -> list[Any]:
    """Return the alternatives of the complement of one keyword."""
    match keyword, value:
        case "type", _:
            return _other_types(value)
        case "const", _:
            return _other_values([value])
        case "enum", list():
            return _other_values(value)
        case "required", list() if all(isinstance(name, str) for name in value):
            return [{"type": "object", "properties": {name: False}} for name in value]
        case "properties", dict():
            return [
                {"type": "object", "properties": {name: complement(each, document, depth)}, "required": [name]}
                for name, each in value.items()
                if each is not True and each != {}
            ]
        case "anyOf", list():
            return [{"allOf": [complement(each, document, depth) for each in value]}]
        case "allOf", list():
            return [complement(each, document, depth) for each in value]
        case "not", _:
            return [value]
        case "$ref", str():
            return [complement(document.find(value), document, depth)]
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum", int() | float():
            return [_other_side(keyword, value)]
    return _other_lengths(keyword, value)


def _other_side(keyword: str, value: Any) -> Any:
    if isinstance(value, bool):  # of draft 4: it belongs to another keyword
        raise NoComplement
    opposite = "aximum" if keyword.endswith("inimum") else "inimum"
    return {"type": "number", f"m{opposite}" if keyword.startswith("exclusive") else f"exclusiveM{opposite}": value}


def _other_types(types: Any) -> list[Any]:
    named = {types} if isinstance(types, str) else set(types)
    if "integer" in named and "number" not in named:
        raise NoComplement  # no schema says that a number has a fraction
    others = [name for name in _TYPES if name not in named]
    return [{"type": others}] if others else []


def _other_values(values: list[Any]) -> list[Any]:
    """Return the values of all types but these values."""
    if any(isinstance(value, list | dict) for value in values):
        raise NoComplement
    strings = [value for value in values if isinstance(value, str)]
    booleans = [value for value in values if isinstance(value, bool)]
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    found: list[Any] = [{"type": ["array", "object"]}]
    found += [] if None in values else [{"type": "null"}]
    found += [{"const": value} for value in (True, False) if value not in booleans]
    found.append({"type": "string", "pattern": f"^{_other_texts(strings)}$"} if strings else {"type": "string"})
    for low, high in zip([None, *numbers], [*numbers, None], strict=True):
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        found.append({"type": "number"} | {name: edge for name, edge in bounds.items() if edge is not None})
    return found


def _other_texts(texts: Iterable[str]) -> str:
    """Return an expression for all texts but these."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return f"(?:{_others(tree)})"


def _others(tree: dict[str, Any]) -> str:
    chars = {rf"\u{{{ord(char):x}}}": char for char in tree if char}
    end = [] if "" in tree else [""]
    if not chars:
        return "|".join(["[^][^]*", *end])
    other = f"[^{''.join(chars)}][^]*"
    return "|".join([other, *(f"{escape}(?:{_others(tree[char])})" for escape, char in chars.items()), *end])


def _other_lengths(keyword: str, value: Any) -> list[Any]:
    for name, kind in _LENGTHS.items():
        if keyword == f"min{name}" and type(value) is int:
            return [{"type": kind, f"max{name}": value - 1}] if value else []
        if keyword == f"max{name}" and type(value) is int:
            return [{"type": kind, f"min{name}": value + 1}]
    raise NoComplement
