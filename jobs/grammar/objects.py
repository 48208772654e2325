"""The keywords of objects: properties, their names, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.grammar.keywords import count_keyword, listed, searched, writable
from jobs.grammar.negation import ASSERTIONS
from jobs.grammar.patterns import ANY, literal, search_patterns
from jobs.grammar.trial import is_found

MAX_PROPERTIES: Final = 1_000  # of one object
_MAX_PATTERNS: Final = 40  # of names: all pairs are compared
_MAX_COUNTED: Final = 100  # optional properties of an object with minProperties or maxProperties
_ALL_NAMES: Final = (search_patterns(""), search_patterns("^"))  # of patterns that are found in every name
_NAME_KEYWORDS: Final = frozenset({"type", "pattern", "const", "enum", "minLength", "maxLength"})

Both = Callable[[Any, Any], Any]
Rewrite = Callable[..., Any]  # of a part of the schema, and the steps to it


def object_keywords(schema: Mapping[str, Any], rewrite: Rewrite) -> dict[str, Any]:
    """Return the keywords of objects, those of one object together: they depend on each other."""
    found: dict[str, Any] = {}
    properties = _members(schema, "properties")
    if len(properties) > MAX_PROPERTIES:
        raise InvalidValue(f"An object may have at most {MAX_PROPERTIES} properties.", param="properties")
    if properties:
        found["properties"] = {
            writable(name, "properties"): rewrite(part, "properties", name) for name, part in properties.items()
        }
    if patterns := _members(schema, "patternProperties"):
        if len(patterns) > _MAX_PATTERNS:
            raise InvalidValue(f"must have at most {_MAX_PATTERNS} patterns", param="patternProperties")
        found["patternProperties"] = {
            _key(pattern): rewrite(part, "patternProperties", pattern) for pattern, part in patterns.items()
        }
    if "additionalProperties" in schema:
        found["additionalProperties"] = rewrite(schema["additionalProperties"], "additionalProperties")
    if required := _required(schema):
        found["required"] = required
    found |= count_keyword(schema, "minProperties") | count_keyword(schema, "maxProperties")
    if "propertyNames" in schema:
        found |= _named(schema["propertyNames"], found)
    _check_counts(found)
    return found


def without_unnamed(found: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of an object with no properties but the named ones, unless they say something of others.

    An answer stays valid without them, and small models would name more and more. `found` are all keywords that hold
    for the object, as `object_keywords` returns them.
    """
    names = found.get("properties", {}).keys()
    if not names or found.keys() & {"additionalProperties", "patternProperties"}:
        return found
    if not names >= set(found.get("required", [])) or found.get("minProperties", 0) > len(names):
        return found
    return found | {"additionalProperties": False}


def without_general_pattern(schema: dict[str, Any], both: Both) -> dict[str, Any]:
    """Return the schema of an object, in which a pattern for all names is written as `additionalProperties`.

    `both` returns the schema of two that must hold, the same for the same two.
    """
    patterns = schema.get("patternProperties")
    if not isinstance(patterns, dict) or len(patterns) != 1:
        return schema
    ((pattern, part),) = patterns.items()
    if searched(pattern, "patternProperties") not in _ALL_NAMES:
        return schema
    others = {name: value for name, value in schema.items() if name != "patternProperties"}
    named = schema.get("properties")
    if isinstance(named, dict):
        others["properties"] = {name: both(each, part) for name, each in named.items()}
    return others | {"additionalProperties": part}


def _members(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    members = schema.get(name, {})
    if not isinstance(members, dict):
        raise InvalidValue("must be an object", param=name)
    return members


def _required(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("required", [])
    if isinstance(names, bool):
        raise InvalidValue("must be a list of names in the schema of the object", param="required")
    if not all(isinstance(name, str) for name in listed(names, "required")):
        raise InvalidValue("must be a list of names", param="required")
    return [writable(name, "required") for name in dict.fromkeys(names)]


def _key(pattern: str) -> str:
    keys = searched(pattern, "patternProperties")
    if len(keys) > 1:
        raise UnsupportedParameter("A lookahead in the name of a property can't be held.", param="patternProperties")
    return f"^{keys[0]}$"


def _named(names: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties, with names that are valid for `propertyNames`."""
    if isinstance(names, bool):
        return {} if names else {"maxProperties": 0}
    if not isinstance(names, dict):
        raise InvalidValue("A schema is an object, true or false.", param="propertyNames")
    rules = {name: value for name, value in names.items() if name in ASSERTIONS and (name, value) != ("type", "string")}
    if not rules:
        return {}
    if not rules.keys() <= _NAME_KEYWORDS or "type" in rules or "patternProperties" in found:
        raise UnsupportedParameter(
            "Only a pattern, an enum or lengths of names can be held, and no patternProperties beside them.",
            param="propertyNames",
        )
    keys = _name_patterns(rules)
    if len(keys) > 1:
        raise UnsupportedParameter(
            "Only one rule for names can be held; write it as one pattern.", param="propertyNames"
        )
    properties = {name: part for name, part in found.get("properties", {}).items() if _is_valid(name, rules)}
    invalid = {name: False for name in found.get("properties", {}) if name not in properties}
    others = found.get("additionalProperties", True)
    return {
        "properties": properties | invalid,
        "patternProperties": {f"^{keys[0]}$": others},
        "additionalProperties": False,
    }


def _name_patterns(rules: Mapping[str, Any]) -> list[str]:
    found = list(searched(rules["pattern"], "propertyNames")) if "pattern" in rules else []
    for name, values in (("enum", rules.get("enum")), ("const", [rules["const"]] if "const" in rules else None)):
        if values is not None:
            texts = [writable(value, "propertyNames") for value in listed(values, name) if isinstance(value, str)]
            found.append(f"(?:{'|'.join(map(literal, texts))})")
    lengths = {name: rules[name] for name in ("minLength", "maxLength") if name in rules}
    if lengths:
        lengths = count_keyword(rules, "minLength") | count_keyword(rules, "maxLength")
        found.append(f"{ANY}{{{lengths.get('minLength', 0)},{lengths.get('maxLength', '')}}}")
    return found


def _is_valid(name: str, rules: Mapping[str, Any]) -> bool:
    return (
        ("pattern" not in rules or is_found(rules["pattern"], name))
        and name in rules.get("enum", [name])
        and name == rules.get("const", name)
        and rules.get("minLength", 0) <= len(name) <= rules.get("maxLength", len(name))
    )


def _check_counts(found: Mapping[str, Any]) -> None:
    """Refuse numbers of properties that can't be counted: a name that is free may occur twice, and then counts once."""
    required = found.get("required", [])
    if found.get("minProperties", 0) > max(1, len(required) + 1):
        raise UnsupportedParameter(
            "More properties than the required ones and one other can't be demanded; name them in required.",
            param="minProperties",
        )
    optional = len(found.get("properties", {}).keys() - set(required))
    for name in ("minProperties", "maxProperties"):
        if name in found and optional > _MAX_COUNTED:
            raise UnsupportedParameter(
                f"It can be held for at most {_MAX_COUNTED} optional properties, not {optional}.", param=name
            )
