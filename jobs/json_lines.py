"""Serialize JSON on one line. All NDJSON and server-sent events of bASIC are written with this module.

`str.splitlines`, and clients that use it, also split at U+0085, U+2028 and U+2029, which JSON allows in strings. Escape
them, so that every reader sees one line with the same value.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel

# JSON already escapes the other line breaks: all characters below U+0020.
_LINE_ENDS: Final = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def json_line(value: Any) -> str:
    """Serialize a value, or a model without its None fields, as JSON on one line, without a newline."""
    if isinstance(value, BaseModel):
        return one_line(value.model_dump_json(exclude_none=True))
    return one_line(json.dumps(value, ensure_ascii=False))


def one_line(json_text: str) -> str:
    """Escape the line breaks that JSON allows in strings. The text must have no newlines."""
    return json_text.translate(_LINE_ENDS) if not json_text.isascii() else json_text
