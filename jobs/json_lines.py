"""JSON on one line, for readers that split text into lines. Every JSON line and event that leaves us is written here.

A newline can't stand in a JSON string, but three characters can at which `str.splitlines` and clients built on it end a
line: U+0085, U+2028 and U+2029. They are escaped, so each such reader sees one line; the value stays the same.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel

# JSON itself escapes the others at which readers split: all characters below U+0020.
_LINE_ENDS: Final = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def json_line(value: Any) -> str:
    """Return a value, or a model without the fields that are None, as JSON on one line, without a newline."""
    if isinstance(value, BaseModel):
        return one_line(value.model_dump_json(exclude_none=True))
    return one_line(json.dumps(value, ensure_ascii=False))


def one_line(json_text: str) -> str:
    """Return a JSON text that was written without newlines such that no reader finds the end of a line in it."""
    return json_text.translate(_LINE_ENDS) if not json_text.isascii() else json_text
