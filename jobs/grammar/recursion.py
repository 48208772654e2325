"""Definitions of a rewritten schema that demand themselves: no finite value is valid for these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from jobs.errors import InvalidValue

_NAME_AT: Final = len("#/$defs/")
_MAX_CHAIN: Final = 500  # levels of schemas in definitions that name each other: llguidance needs the stack for each


def remove_endless(root: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the definitions, those without a finite value as false.

    Raise InvalidValue if the root has none, and if a definition is defined by itself only.
    """
    if _longest_chain(root, definitions) > _MAX_CHAIN:
        raise InvalidValue(
            f"The definitions name each other in more than {_MAX_CHAIN} levels; make the schema smaller."
        )
    for name in definitions:
        _refuse_circle(name, definitions)
    finite: set[str] = set()
    while found := {name for name in definitions.keys() - finite if _is_finite(definitions[name], finite)}:
        finite |= found
    if not _is_finite(root, finite):
        raise InvalidValue("No value is valid for this schema: it is false, or demands itself without an end.")
    return {name: schema if name in finite else False for name, schema in definitions.items()}


def _refuse_circle(name: str, definitions: dict[str, Any]) -> None:
    """Refuse a definition that leads to itself by keywords that apply to the same value."""
    seen: set[str] = set()
    waiting = [definitions[name]]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, bool):
            continue
        waiting += [part for keyword in ("allOf", "anyOf") for part in schema.get(keyword, [])]
        if "$ref" in schema and (target := schema["$ref"][_NAME_AT:]) not in seen:
            if target == name:
                raise InvalidValue("The schema refers to itself for the same value, without an end.", param="$ref")
            seen.add(target)
            waiting.append(definitions[target])


def _is_finite(schema: Any, finite: set[str]) -> bool:
    """Return whether a finite value may be valid, given the definitions that have one."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"][_NAME_AT:] not in finite:
        return False
    if not all(_is_finite(part, finite) for part in schema.get("allOf", [])):
        return False
    if "anyOf" in schema and not any(_is_finite(part, finite) for part in schema["anyOf"]):
        return False
    types = schema.get("type", "null")
    return any(_has_finite(name, schema, finite) for name in ([types] if isinstance(types, str) else types))


def _has_finite(name: str, schema: dict[str, Any], finite: set[str]) -> bool:
    if name == "object":
        parts, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if "patternProperties" in schema:
            others = True
        return all(_is_finite(parts.get(each, others), finite) for each in schema.get("required", []))
    if name == "array":
        first = schema.get("prefixItems", [])
        least = schema.get("minItems", 0)
        needed = [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
        return all(_is_finite(part, finite) for part in needed)
    return True


def _longest_chain(root: Any, definitions: dict[str, Any]) -> int:
    """Return how deep schemas are nested if each definition is read where it is named first, as llguidance does."""
    seen: set[str] = set()
    reading = [(_references(root), 0)]
    longest = 0
    while reading:
        references, depth = reading[-1]
        found = next(references, None)
        if found is None:
            reading.pop()
        elif found[0] not in seen:
            seen.add(found[0])
            longest = max(longest, depth + found[1])
            reading.append((_references(definitions[found[0]]), depth + found[1]))
    return longest


def _references(schema: Any, depth: int = 1) -> Iterator[tuple[str, int]]:
    """Yield the definitions that a schema names, and their depths in it."""
    if isinstance(schema, dict):
        for keyword, part in schema.items():
            if keyword == "$ref" and isinstance(part, str):
                yield part[_NAME_AT:], depth
            elif keyword not in ("const", "enum", "required"):
                yield from _references(part, depth + 1)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part, depth)
