"""Log formatting for all processes: text for people, or one JSON object per line for machines.

- A message is always one line, so text from a caller can't fake a log line.
- Lines carry the ids of their job and request, from `extra` or from `log_context`, which covers libraries too.
- Passwords in URLs are masked in every line, also in those of libraries.
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
# Line breaks, terminal controls, marks of writing direction, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_INDENT: Final = "    "
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# Labels in text lines. `request_id` is the API server's id of one HTTP call, which is also in its response headers.
_NAMES: Final[Mapping[str, str]] = {"job_id": "job", "request_index": "request", "request_id": "call"}
_log_context: ContextVar[Mapping[str, object]] = ContextVar("log_context", default=MappingProxyType({}))


def bind_log_context(**ids: object) -> None:
    """Add ids to all further lines of this task or thread."""
    _log_context.set({**_log_context.get(), **ids})


@contextmanager
def log_context(**ids: object) -> Iterator[None]:
    """Add ids to all lines that are logged inside the block."""
    token = _log_context.set({**_log_context.get(), **ids})
    try:
        yield
    finally:
        _log_context.reset(token)


def _add_log_context(record: logging.LogRecord) -> bool:
    for name, value in _log_context.get().items():
        vars(record).setdefault(name, value)  # the line's own `extra` wins
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields of `extra`."""

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
    """One line of text per record, followed by the traceback, if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return without_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message with its ids at the end, such as `[job batch_1, request 3]`."""
        about = [f"{name} {vars(record)[field]}" for field, name in _NAMES.items() if field in vars(record)]
        return _without_controls(super().formatMessage(record) + (f" [{', '.join(about)}]" if about else ""))

    def formatException(self, ei: Any) -> str:
        """Return the traceback. Indent the messages of exceptions, so that no line looks like a log line."""
        parts = traceback.TracebackException(*ei).format()
        return "\n".join(line for part in parts for line in _indented(part.splitlines()))


def _without_controls(text: str) -> str:
    """Escape line breaks, control characters (but not tabs) and lone surrogates, which no stream can encode."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _indented(lines: list[str]) -> Iterator[str]:
    """Yield the lines, all but the first indented."""
    for number, line in enumerate(lines):
        indent = _INDENT if number and line and not line.startswith(" ") else ""
        yield indent + _without_controls(line)


def without_secrets(text: str) -> str:
    """Return the text with the passwords of all URLs in it masked."""
    return _PASSWORD.sub(lambda found: (found["before"] or found["query"]) + "***", text)


def log_to_stderr(log_format: str, level: int = logging.INFO) -> None:
    """Log to standard error in the given format, `text` or `json`."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    handler.addFilter(_add_log_context)
    logging.basicConfig(level=level, handlers=[handler], force=True)
