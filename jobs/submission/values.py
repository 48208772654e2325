"""Check JSON values of a request, and name them in errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from jobs.errors import InvalidValue, MissingParameter, UnknownParameter


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
