"""The one shape of an error, in replies and in the lines of outputs."""

from __future__ import annotations

from typing import Any


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the envelope: all four keys, always."""
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
