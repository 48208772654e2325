"""Responses of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterable

from fastapi.responses import StreamingResponse

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the second disables buffering in nginx


def event_stream(events: AsyncIterable[str] | AsyncIterable[bytes]) -> StreamingResponse:
    """Return the response that sends encoded events as they come."""
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)
