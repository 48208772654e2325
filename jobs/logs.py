"""Log lines for every process of ours: sentences for people, or one JSON object a line for machines.

A sentence is one line whatever it holds: what a caller sent can't add a line that looks like ours.

A line says which job and request it is about where there are any: by its `extra`, or by what is noted around it, which
holds for lines of libraries too. No line carries a password: whatever looks like a URL with one loses it, whoever wrote
the line.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

_PASSWORD = re.compile(
    r"(?P<before>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+(?=@)|(?P<query>[?&](?:ssl)?password=)[^\s&,\x22']+"
)
# All at which a reader may end a line, or that a terminal obeys: C0, DEL and C1, U+2028 and U+2029, and what turns the
# direction of writing; and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_INDENT: Final = "    "
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# As lines for people name them. `request_id` is the shim's name of one HTTP call, which its reply carries too.
_NAMES: Final[Mapping[str, str]] = {"job_id": "job", "request_index": "request", "request_id": "call"}
_noted: ContextVar[Mapping[str, object]] = ContextVar("noted", default=MappingProxyType({}))


def note(**ids: object) -> None:
    """Let all lines of this task or thread say what they are about, from now on."""
    _noted.set({**_noted.get(), **ids})


@contextmanager
def noted(**ids: object) -> Iterator[None]:
    """Let all lines within say what they are about."""
    token = _noted.set({**_noted.get(), **ids})
    try:
        yield
    finally:
        _noted.reset(token)


def _add_noted(record: logging.LogRecord) -> bool:
    for name, value in _noted.get().items():
        vars(record).setdefault(name, value)  # the line itself knows better
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str))


class TextFormatter(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and its traceback below."""
        return without_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line with what it is about at its end, before any traceback."""
        about = [f"{name} {vars(record)[field]}" for field, name in _NAMES.items() if field in vars(record)]
        return _without_controls(super().formatMessage(record) + (f" [{', '.join(about)}]" if about else ""))

    def formatException(self, ei: Any) -> str:
        """Return the traceback. What an exception says on further lines is indented, as are the lines of frames."""
        parts = traceback.TracebackException(*ei).format()
        return "\n".join(line for part in parts for line in _indented(part.splitlines()))


def _without_controls(text: str) -> str:
    """Return the text with its line breaks and control characters escaped, tabs excepted.

    Halves of surrogate pairs are escaped too: no stream can encode them.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _indented(lines: list[str]) -> Iterator[str]:
    """Yield the first line, and the others so that none of them begins as a line of ours."""
    for number, line in enumerate(lines):
        indent = _INDENT if number and line and not line.startswith(" ") else ""
        yield indent + _without_controls(line)


def without_secrets(text: str) -> str:
    """Return the text with the passwords of all URLs in it blotted out."""
    return _PASSWORD.sub(lambda found: (found["before"] or found["query"]) + "***", text)


def log_to_stderr(log_format: str, level: int = logging.INFO) -> None:
    """Send all log lines to standard error in the given format, `text` or `json`."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    handler.addFilter(_add_noted)
    logging.basicConfig(level=level, handlers=[handler], force=True)
