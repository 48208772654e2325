"""The keywords of strings: lengths, patterns, formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.grammar.formats import INTEGERS, MAX_LENGTHS, PATTERNS, WITHOUT_FORM
from jobs.grammar.keywords import count_keyword
from jobs.grammar.patterns import ANY, full_pattern, search_patterns

_NUMBERS: Final = ("integer", "number")


def string_keywords(schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the lengths of strings, and the patterns that all must match, in llguidance's syntax."""
    found = count_keyword(schema, "minLength") | count_keyword(schema, "maxLength")
    patterns: list[str] = []
    if "pattern" in schema:
        patterns += searched(schema["pattern"], "pattern")
    if "format" in schema:
        patterns += _format(schema["format"], schema)
    return found, [f"^{pattern}$" for pattern in patterns]


def searched(pattern: Any, name: str) -> tuple[str, ...]:
    """Return the translation of a pattern of the schema; raise RequestRefused with the field `name`."""
    if not isinstance(pattern, str):
        raise InvalidValue("must be a string", param=name)
    try:
        return search_patterns(pattern)
    except (InvalidValue, UnsupportedParameter) as refused:
        raise type(refused)(refused.message, param=name) from refused


def _format(name: Any, schema: Mapping[str, Any]) -> list[str]:
    if not isinstance(name, str):
        raise InvalidValue("must be a string", param="format")
    types = schema.get("type", "string")
    types = types if isinstance(types, list) else [types]
    if name in WITHOUT_FORM or (name in INTEGERS and "integer" in types):
        return []
    if name in PATTERNS:
        longest = MAX_LENGTHS.get(name)
        return [full_pattern(PATTERNS[name]), *([] if longest is None else [f"{ANY}{{1,{longest}}}"])]
    if not {"string", *_NUMBERS} & set(types):
        return []  # formats are for strings and numbers
    raise UnsupportedParameter(
        f"The format {name[:40]!r} can't be held. Leave it out, and say with a pattern what the text looks like.",
        param="format",
    )
