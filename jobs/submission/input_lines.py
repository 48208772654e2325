"""The lines of a file that someone sends: where they end, what a broken one still says, and what a file is instead.

Knows no requests. Holds one line at a time, and none beyond its limit.
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
# What a line may hold and still be empty, or have around its JSON: spaces of Unicode, marks, and the end of a DOS file.
_BLANKS: Final = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + _BOM + "\x1a\u200b\u2060"
_START_BYTES: Final = 65_536  # that are kept of a line which is too long: its custom_id stands there, if anywhere
_MAX_PARTS: Final = 200_000  # of a broken line that are looked at for its custom_id
_SAMPLE_LINES: Final = 20
_SAMPLE_BYTES: Final = 65_536
_ARRAY: Final = re.compile(rb"\[\s*[{\"]")
_ONE_LINE: Final = re.compile(rb"[^\r]*\}\r\s*\{")

# A string, also one that does not end, in JSON's quotes or Python's. Possessive: a broken line is read once, not once a
# quote.
_STRING: Final = r"\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\"?|'[^'\\]*+(?:\\.[^'\\]*+)*+'?"
_PART: Final = re.compile(
    rf"[\"'](?P<name>custom_id|id)[\"']\s*:\s*(?P<value>{_STRING})|{_STRING}|(?P<open>[{{\[])|(?P<close>[}}\]])",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank, and its number in the file, counted from 1. Of one that is too long only the start."""

    number: int
    text: bytes
    too_long: bool = False


def split_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file that comes in chunks. They end at a newline only: U+2028 may stand in a JSON string."""
    for number, (raw, too_long) in enumerate(_raw_lines(chunks, max_bytes + 2), start=1):  # with its end, CR and LF
        text = _bare(raw)
        if too_long or len(text) > max_bytes:
            yield Line(number, text[:_START_BYTES], too_long=True)
        elif text:
            yield Line(number, text)


def find_custom_id(text: bytes) -> str | None:
    """Return the custom_id that a line says which is not JSON, so that its error reaches the one who sent it.

    Only a name of the outermost object counts: what stands in a prompt or deeper is not the line's own.
    """
    found: dict[str, str] = {}
    depth = 0
    for part in islice(_PART.finditer(text.decode(errors="replace")), _MAX_PARTS):
        depth += bool(part["open"]) - bool(part["close"])
        if part["name"] and depth == 1 and (value := _string(part["value"])) is not None:
            found[part["name"]] = value
    return found.get("custom_id", found.get("id"))


def describe_format(sample: Sequence[bytes]) -> str | None:
    """Return what a file is none of whose lines can be read, by its first lines, and what to do; None if unclear."""
    text = b"\n".join(sample)
    try:
        reject_other_formats(text, "The file", "")
    except InvalidValue as refused:
        return refused.message
    if len(sample) == 1 and _ARRAY.match(text):  # too long to be kept as a whole
        return "The file is one JSON array; write one request a line, for instance with jq -c '.[]'."
    if _ONE_LINE.match(text):
        return "The lines of the file end with a carriage return alone; end them with a newline."
    return None


class Sample:
    """The first lines of a file, as much of them as tells what it is."""

    def __init__(self) -> None:
        """Start with none."""
        self.lines: list[bytes] = []
        self._bytes = 0

    def add(self, line: bytes) -> None:
        """Keep a line, if there is still room."""
        if len(self.lines) < _SAMPLE_LINES and self._bytes < _SAMPLE_BYTES:
            self.lines.append(line[:_SAMPLE_BYTES])
            self._bytes += len(line)


def _raw_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield lines without their newline, the last one too if it is not empty; True with the start of a longer one."""
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


def _bare(line: bytes) -> bytes:
    """Return a line without what is blank around it."""
    text = line.strip()
    if not text or (text[0] in b'{["' and text[-1] in b'}]"'):
        return text
    try:
        return text.decode().strip(_BLANKS).encode()
    except UnicodeDecodeError:
        return text


def _string(token: str) -> str | None:
    """Return what a string says, also one in Python's quotes; None for one that does not end or can't be read."""
    if len(token) < 2 or token[-1] != token[0]:
        return None
    if "\\" not in token:
        return token[1:-1]
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return None
    return str(value)
