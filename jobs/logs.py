"""Log lines for every process of ours: sentences for people, or one JSON object a line for machines.

No line carries a password: whatever looks like a URL with one loses it, whoever wrote the line.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime

_PASSWORD = re.compile(
    r"(?P<before>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+(?=@)|(?P<query>[?&](?:ssl)?password=)[^\s&,\x22']+"
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


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
        """Return the record as text."""
        return without_secrets(super().format(record))


def without_secrets(text: str) -> str:
    """Return the text with the passwords of all URLs in it blotted out."""
    return _PASSWORD.sub(lambda found: (found["before"] or found["query"]) + "***", text)


def log_to_stderr(log_format: str, level: int = logging.INFO) -> None:
    """Send all log lines to standard error in the given format, `text` or `json`."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
