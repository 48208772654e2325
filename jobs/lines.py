"""A batch file as lines, and whether it is one: the cheap pass over the whole file before anything of it runs.

jobs.clerk -> [lines] -> items.  What is wrong with the structure of any line refuses the batch, and every bad line is
named; what is wrong with the content of a request fails that request later, alone. Never holds more than one line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.items import MAX_CUSTOM_ID_CHARS, clean_text, read_json

MAX_ERRORS: Final = 100
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank, and its number in the file, counted from 1. None for a text that is too long."""

    number: int
    text: bytes | None


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be."""

    requests: int
    line_bytes: int


@dataclass(slots=True)
class Findings:
    """What the pass over a batch file found."""

    errors: list[dict[str, Any]] = field(default_factory=list)  # in the order of the lines, at most MAX_ERRORS
    model: str = ""
    requests: int = 0

    def add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        """Note an error, in the fields of OpenAI's BatchError."""
        self.errors.append({"code": code, "line": line, "message": message, "param": param})


def split_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file that comes in chunks. They end at a newline only: U+2028 may stand in a JSON string."""
    number = 1
    for line in _raw_lines(chunks, max_bytes + 2):  # with its end, CR and LF
        text = line.removeprefix(_BOM) if number == 1 and line is not None else line
        text = text.strip() if text is not None else None
        if text is None or len(text) > max_bytes:
            yield Line(number, None)
        elif text:
            yield Line(number, text)
        number += 1


def check_lines(lines: Iterable[Line], endpoint: str, models: Collection[str], limits: Limits) -> Findings:
    """Return all that is wrong with the structure of a batch file; without errors, its model and number of requests."""
    check = _Check(endpoint, models, limits)
    for line in lines:
        check.findings.requests += 1
        if check.findings.requests > limits.requests:
            check.findings.errors.clear()
            check.findings.add("too_many_tasks", f"A batch may hold {limits.requests} requests; split the file.")
            break
        check.line(line)
        if len(check.findings.errors) >= MAX_ERRORS:
            break
    if not check.findings.requests:
        check.findings.add("empty_file", "The file holds no requests.")
    return check.findings


def _raw_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield lines without their newline, the last one too if it is not empty; None for one of more than `max_bytes`."""
    rest = b""
    too_long = False
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield None if too_long else rest + line
            rest, too_long = b"", False
        too_long = too_long or len(rest) + len(last) > max_bytes
        rest = b"" if too_long else rest + last
    if rest or too_long:
        yield None if too_long else rest


class _Check:
    """Looks at one line after the other and remembers what the next ones must agree with."""

    def __init__(self, endpoint: str, models: Collection[str], limits: Limits) -> None:
        self.findings = Findings()
        self._endpoint = endpoint
        self._models = models
        self._limits = limits
        self._lines_by_custom_id: dict[str, int] = {}

    def line(self, line: Line) -> None:
        """Note the first thing that is wrong with a line."""
        if line.text is None:
            self._add(line, "invalid_json_line", f"The line has more than {self._limits.line_bytes} bytes.")
            return
        try:
            value = read_json(line.text)
        except ValueError as exc:
            self._add(line, "invalid_json_line", f"The line is not JSON: {exc}.")
            return
        if not isinstance(value, dict):
            self._add(line, "invalid_json_line", "The line is not a JSON object.")
            return
        for look in (self._custom_id, self._method, self._url, self._body):
            if not look(line, value):
                return

    def _add(self, line: Line, code: str, message: str, param: str | None = None) -> bool:
        self.findings.add(code, message, line.number, param)
        return False

    def _has(self, line: Line, value: dict[str, Any], name: str, kind: type, what: str) -> bool:
        if value.get(name) is None:
            return self._add(line, "missing_required_parameter", f"The line has no {name}.", name)
        if not isinstance(value[name], kind):
            return self._add(line, "invalid_request", f"{name} must be {what}.", name)
        return True

    def _custom_id(self, line: Line, value: dict[str, Any]) -> bool:
        if not self._has(line, value, "custom_id", str, "a string"):
            return False
        custom_id = value["custom_id"]
        if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            message = f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters."
            return self._add(line, "invalid_request", message, "custom_id")
        try:
            clean_text(custom_id, "custom_id")
        except InvalidValue as exc:
            return self._add(line, "invalid_request", exc.message, "custom_id")
        earlier = self._lines_by_custom_id.setdefault(custom_id, line.number)
        if earlier != line.number:
            message = f"Line {earlier} has the same custom_id {custom_id!r}."
            return self._add(line, "duplicate_custom_id", message, "custom_id")
        return True

    def _method(self, line: Line, value: dict[str, Any]) -> bool:
        if not self._has(line, value, "method", str, "a string"):
            return False
        return value["method"] == "POST" or self._add(line, "invalid_method", "method must be POST.", "method")

    def _url(self, line: Line, value: dict[str, Any]) -> bool:
        if not self._has(line, value, "url", str, "a string"):
            return False
        message = f"url must be the batch's endpoint, {self._endpoint}."
        return value["url"] == self._endpoint or self._add(line, "invalid_url", message, "url")

    def _body(self, line: Line, value: dict[str, Any]) -> bool:
        if not self._has(line, value, "body", dict, "an object"):
            return False
        model = value["body"].get("model")
        if model is None:
            return self._add(line, "missing_required_parameter", "The body names no model.", "body.model")
        if not isinstance(model, str) or model not in self._models:
            message = f"There is no model {str(model)[:80]!r}; there is {', '.join(sorted(self._models))}."
            return self._add(line, "model_not_found", message, "body.model")
        self.findings.model = self.findings.model or model
        if model != self.findings.model:
            message = f"The lines before ask for {self.findings.model}; another model needs a batch of its own."
            return self._add(line, "mismatched_model", message, "body.model")
        return True
