"""Close the objects of a JSON schema: those that say nothing about other properties have none."""

from __future__ import annotations

from typing import Any, Final

_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES: Final = frozenset({"const", "default", "enum", "examples", "required"})


def closed(schema: Any, *, keep_unique: bool = True) -> Any:
    """Return the schema with `additionalProperties` false wherever it is open and names properties.

    Without `keep_unique`, arrays may repeat items, unless the number of different ones matters.
    """
    if isinstance(schema, list):
        return [closed(part, keep_unique=keep_unique) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _part(name, part, keep_unique) for name, part in schema.items()}
    if not keep_unique and schema.get("minItems", 0) <= 1:
        found.pop("uniqueItems", None)
    names = any(isinstance(schema.get(name), dict) for name in ("properties", "patternProperties"))
    return found | {"additionalProperties": False} if names and "additionalProperties" not in schema else found


def _part(name: str, part: Any, keep_unique: bool) -> Any:
    if name in _VALUES:
        return part
    if name in _MAPS and isinstance(part, dict):
        return {key: closed(each, keep_unique=keep_unique) for key, each in part.items()}
    return closed(part, keep_unique=keep_unique)
