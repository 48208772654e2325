"""Read the items of a submission, each the input of one request: from lines of a file, or from a list.

An item that can't be read becomes one that the parser rejects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from pydantic_core import from_json

from jobs.errors import InvalidJsonLine
from jobs.input_format import wide_encoding
from jobs.submission.input_lines import Line, Sample, find_custom_id, split_lines

MAX_JSON_NODES = 500_000  # lists and objects of one JSON text: 2 bytes each or more as text, up to 240 in memory
_CHUNK_BYTES = 1 << 20  # of a file, per read
_NO_NUMBER = re.compile(rb"-?(?:NaN|Infinity)")


@dataclass(frozen=True, slots=True)
class Item:
    """The input of one request, and its location: a 1-based line of a file, or an index of a list."""

    index: int
    value: Any
    line: int | None = None
    recovered_id: str | None = None  # custom_id found in an unreadable line

    @property
    def location(self) -> str:
        """The location of the item, for error messages."""
        return f"line {self.line}" if self.line is not None else f"requests[{self.index}]"

    @property
    def model(self) -> Any:
        """The item's model, not validated, or None."""
        fields = self.value.get("body", self.value) if isinstance(self.value, dict) else None
        return fields.get("model") if isinstance(fields, dict) else None

    @property
    def is_readable(self) -> bool:
        """True if the value is a string or an object, and so may be a request."""
        return isinstance(self.value, str | dict)


def read_lines(file: IO[bytes], max_line_bytes: int) -> Iterator[Item]:
    """Yield the items of a JSONL file. Skip blank lines; an invalid line becomes an item that will be rejected.

    Raise InvalidJsonLine after the last line if the file has another known format: if no line is readable, or if one
    JSON value fills the file.
    """
    sample = Sample()
    for index, line in enumerate(split_lines(iter(partial(file.read, _CHUNK_BYTES), b""), max_line_bytes)):
        item = _read_line(index, line, max_line_bytes)
        sample.add(line.text, item.is_readable)
        yield item
        del item  # before the next one is read: a line of 10 MB may be 400 MB as a value
    if (found := sample.describe_format()) is not None:
        raise InvalidJsonLine(found)


def read_json(text: bytes) -> Any:
    """Parse strict JSON; raise ValueError also for NaN and lone surrogates.

    First count brackets and braces, also those in strings, because nested lists take 40 times their text in memory.
    """
    if text.count(b"[") + text.count(b"{") > MAX_JSON_NODES:
        raise ValueError(f"more than {MAX_JSON_NODES} lists and objects")
    return from_json(text, allow_inf_nan=False)


def _read_line(index: int, line: Line, max_line_bytes: int) -> Item:
    try:
        return Item(index, read_line(line, max_line_bytes), line.number)
    except InvalidJsonLine as refused:
        # A new error: the traceback of this one keeps the line, and many invalid lines may wait together.
        return Item(index, InvalidJsonLine(refused.message), line.number, find_custom_id(line.text))


def read_value(index: int, value: Any) -> Item:
    """Return the item of a value from a message that is not strict JSON as a whole."""
    text = json.dumps(value).encode()
    try:
        return Item(index, read_json(text))
    except ValueError as exc:
        return Item(index, InvalidJsonLine(f"The request is not JSON: {_why(text, exc)}."), None, find_custom_id(text))


def read_line(line: Line, max_bytes: int) -> Any:
    """Return the JSON value of a line; raise InvalidJsonLine, with the reason, if it is invalid or too long."""
    if line.too_long:
        raise InvalidJsonLine(f"The line has more than {max_bytes} bytes.")
    try:
        return read_json(line.text)
    except ValueError as exc:
        raise InvalidJsonLine(f"The line is not JSON: {_why(line.text, exc)}.") from exc


_BOM = "\ufeff".encode()
# What follows a complete value on its line, and why.
_AFTER = {
    _BOM: "a byte order mark inside the line: files were joined without a line break between them",
    b"\x1a": "Ctrl-Z, the end mark of old files, inside the line: files were joined without a line break between them",
    b"{": "two requests on one line; write each on its own line",
    b"[": "two values on one line; write each on its own line",
    b",": "a comma after the request; remove the commas between lines",
}


def _why(text: bytes, exc: ValueError) -> str:
    """Return why a line is not JSON, replacing messages of the parser that don't help."""
    reason, _, column = str(exc).partition(" at line 1 column ")  # the parser's line is always 1
    rest = text[int(column or 1) - 1 :]
    after = next((why for mark, why in _AFTER.items() if rest.startswith(mark)), None)
    if (encoding := wide_encoding(text)) is not None:
        return f"it is {encoding}; save the whole file as UTF-8"
    if text.endswith(b","):
        reason, column = "it ends with a comma", ""
    elif reason == "expected value" and (number := _NO_NUMBER.match(rest)):
        reason = f"{number[0].decode()} is not a JSON number"
    elif reason == "trailing characters" and after is not None:
        reason = after
    elif reason == "invalid unicode code point":
        reason = "it is not UTF-8"
    elif "surrogate" in reason or reason == "unexpected end of hex escape":
        reason = "half of a surrogate pair is not valid text"
    return f"{reason} (column {column})" if column else reason
