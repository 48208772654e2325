"""Split an input file into lines, salvage the custom_id of invalid lines, and recognise files of other formats.

Holds one line at a time, up to its size limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from jobs.errors import InvalidValue
from jobs.input_format import reject_other_formats

_BOM: Final = "\ufeff"
# Stripped around JSON: white space of Unicode, byte-order marks, and the end-of-file character of DOS.
_BLANKS: Final = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + _BOM + "\x1a\u200b\u2060"
_START_BYTES: Final = 65_536  # kept of a line that is too long, to find its custom_id
_MAX_PARTS: Final = 200_000  # of an invalid line that are searched for its custom_id
_SAMPLE_LINES: Final = 20
_SAMPLE_BYTES: Final = 65_536
_EDGE_BYTES: Final = 16  # of the first and the last line
_ARRAY: Final = re.compile(rb"\[\s*[{\"]")
_ONE_LINE: Final = re.compile(rb"[^\r]*\}\r\s*\{")

# A string, possibly unterminated, in double or single quotes. Possessive quantifiers keep the search linear in the
# length of an invalid line.
_STRING: Final = r"\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\"?|'[^'\\]*+(?:\\.[^'\\]*+)*+'?"
_PART: Final = re.compile(
    rf"[\"'](?P<name>custom_id|id)[\"']\s*:\s*(?P<value>{_STRING})|{_STRING}|(?P<open>[{{\[])|(?P<close>[}}\]])",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Line:
    """A non-blank line and its 1-based number; only the start of a line that is too long."""

    number: int
    text: bytes
    too_long: bool = False


def split_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file that arrives in chunks. Split at newlines only, since JSON strings may have U+2028."""
    for number, (raw, too_long) in enumerate(_raw_lines(chunks, max_bytes + 2), start=1):  # + CR LF
        text = _strip(raw)
        if too_long or len(text) > max_bytes:
            yield Line(number, text[:_START_BYTES], too_long=True)
        elif text:
            yield Line(number, text)


def find_custom_id(text: bytes) -> str | None:
    """Return the custom_id in a line that is not valid JSON, so that its error carries the id.

    Only a field of the outermost object counts, not text in a prompt or in nested objects.
    """
    found: dict[str, str] = {}
    depth = 0
    for part in islice(_PART.finditer(text.decode(errors="replace")), _MAX_PARTS):
        depth += bool(part["open"]) - bool(part["close"])
        if part["name"] and depth == 1 and (value := _string(part["value"])) is not None:
            found[part["name"]] = value
    return found.get("custom_id", found.get("id"))


def describe_format(sample: Sequence[bytes]) -> str | None:
    """Recognise the format of an unreadable file by its first lines; return a sentence with advice, or None."""
    text = b"\n".join(sample)
    try:
        reject_other_formats(text, "The file", "")
    except InvalidValue as refused:
        return refused.message
    if len(sample) == 1 and _ARRAY.match(text):  # too long to parse
        return "The file is one JSON array. Write one request per line, for instance with jq -c '.[]'."
    if _ONE_LINE.match(text):
        return "The lines of the file end with carriage returns. End them with newlines."
    return None


class Sample:
    """The first unreadable lines of a file, to recognise its format."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._bytes = 0
        self._first: bytes | None = None
        self._last = b""
        self._any_readable = False

    def add(self, line: bytes, readable: bool) -> None:
        """Add a line; keep unreadable ones, up to _SAMPLE_LINES and _SAMPLE_BYTES."""
        self._first = line[:_EDGE_BYTES] if self._first is None else self._first
        self._last = line[:_EDGE_BYTES]
        self._any_readable |= readable
        if not readable and len(self._lines) < _SAMPLE_LINES and self._bytes < _SAMPLE_BYTES:
            self._lines.append(line[:_SAMPLE_BYTES])
            self._bytes += len(line)

    def describe_format(self) -> str | None:
        """Return what the file is instead of JSON lines, with advice; None if it has readable lines or is unknown.

        A JSON value on several lines may have a readable one, such as the last of an array.
        """
        fills_file = self._first in (b"[", b"{") and self._last in (b"]", b"}")
        return describe_format(self._lines) if self._lines and (fills_file or not self._any_readable) else None


def _raw_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield (line, too_long) without newlines; of a line that is too long, its start."""
    rest = b""
    too_long = False
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield (rest, True) if too_long else (rest + line, False)
            rest, too_long = b"", False
        if not too_long:
            too_long = len(rest) + len(last) > max_bytes
            rest = (rest + last)[:_START_BYTES] if too_long else rest + last
    if rest or too_long:
        yield rest, too_long


def _strip(line: bytes) -> bytes:
    """Strip white space, also that of Unicode."""
    text = line.strip()
    if not text or (text[0] in b'{["' and text[-1] in b'}]"'):
        return text
    try:
        return text.decode().strip(_BLANKS).encode()
    except UnicodeDecodeError:
        return text


def _string(token: str) -> str | None:
    """Return the value of a string in double or single quotes; None if it is unterminated or invalid."""
    if len(token) < 2 or token[-1] != token[0]:
        return None
    if "\\" not in token:
        return token[1:-1]
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return None
    return str(value)
