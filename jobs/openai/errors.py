"""Build OpenAI error objects, for HTTP responses and for lines of error files."""

from __future__ import annotations

from typing import Any


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error object; all four keys are always present."""
    kind = "server_error" if status_code >= 500 else "invalid_request_error"
    if status_code == 429:
        kind = "rate_limit_error"
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code,
        }
    }
