"""Check JSON values of a request, and name them in errors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Final

from jobs.errors import InvalidValue, MissingParameter, UnknownParameter

MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON, not after a backslash that is escaped itself


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Raise UnknownParameter for the first unknown field, suggesting the most similar known one."""
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UnknownParameter(f"Unknown field{hint}", param=f"{prefix}{name[:64]}")


def whole(value: Any, name: str, maximum: int) -> int:
    """Return a whole number from 0 to `maximum`; raise InvalidValue otherwise."""
    if type(value) is not int or not 0 <= value <= maximum:
        raise InvalidValue(f"must be a whole number from 0 to {maximum}, not {shown(value)}", param=name)
    return value


def text(value: Any, param: str) -> str:
    """Return a text that can be stored; raise MissingParameter for null, InvalidValue for other values."""
    if value is None:
        raise MissingParameter("The text is missing.", param=param)
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {kind(value)}", param=param)
    return clean_text(value, param)


def boolean(value: Any, param: str) -> bool:
    """Return true or false; raise InvalidValue for other values."""
    if not isinstance(value, bool):
        raise InvalidValue(f"must be true or false, not {shown(value)}", param=param)
    return value


def object_fields(value: Any, param: str) -> dict[str, Any]:
    """Return the fields of an object that are not null; raise InvalidValue for other values."""
    if not isinstance(value, dict):
        raise InvalidValue(f"must be an object, not {kind(value)}", param=param)
    return {name: inner for name, inner in value.items() if inner is not None}


def clean_text(text: str, param: str) -> str:
    """Return the text; raise InvalidValue for U+0000 and lone surrogates, which PostgreSQL and tokenizers reject."""
    if "\0" in text:
        raise InvalidValue("The character U+0000 is not allowed.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidValue(
            f"Half of a surrogate pair at character {exc.start} is not valid text.", param=param
        ) from exc
    return text


def holds_nul(json_text: str) -> bool:
    """Return whether a string in a JSON text has the character U+0000."""
    return _NUL.search(json_text) is not None


def kind(value: Any) -> str:
    """Return what a value is, for an error message."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else "another type")


def shown(value: Any) -> str:
    """Return a value for an error message, shortened, because the input may be huge."""
    if isinstance(value, list | dict):
        return kind(value)
    written = repr(value)
    return written if len(written) <= 40 else written[:37] + "..."


def check_metadata(metadata: Any) -> Mapping[str, str] | None:
    """Return valid metadata; raise InvalidValue beyond OpenAI's limits."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping) or len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidValue(f"must be an object of at most {MAX_METADATA_PAIRS} pairs", param="metadata")
    for key, value in metadata.items():
        _refuse_long_metadata(key, MAX_METADATA_KEY_CHARS, "key")
        _refuse_long_metadata(value, MAX_METADATA_VALUE_CHARS, "value")
    return metadata


def _refuse_long_metadata(text: Any, limit: int, part: str) -> None:
    if not isinstance(text, str) or len(text) > limit or "\0" in text:
        raise InvalidValue(f"Every {part} must be a string of at most {limit} characters.", param="metadata")
