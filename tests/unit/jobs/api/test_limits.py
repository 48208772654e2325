from __future__ import annotations

import asyncio
import gzip
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from jobs.api.http.limits import BodyLimitMiddleware
from jobs.errors import BodyTooLarge, BodyTooSlow, InvalidValue, UnsupportedBody
from jobs.logs import JsonFormatter


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass


def read(*parts: bytes, headers: dict[str, str] | None = None, idle_s: float = 5.0, max_bytes: int = 10) -> None:
    """Send a body in parts to an application that reads it; an empty part never arrives."""
    waiting = list(parts)

    async def receive() -> Message:
        part = waiting.pop(0)
        if not part:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        raise AssertionError("nothing is answered here")

    encoded = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope: dict[str, Any] = {"type": "http", "headers": encoded}
    asyncio.run(BodyLimitMiddleware(read_all, max_bytes=max_bytes, idle_s=idle_s)(scope, receive, send))


def test_a_body_within_the_limit_passes() -> None:
    read(b"12345", b"67890")


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    with pytest.raises(BodyTooLarge, match="10 bytes"):
        read(b"12345", b"678901", b"")


def test_a_declared_length_over_the_limit_is_rejected_before_the_body_is_read() -> None:
    with pytest.raises(BodyTooLarge):
        read(b"", headers={"content-length": "11"})


def test_a_stalled_body_times_out() -> None:
    with pytest.raises(BodyTooSlow):
        read(b"1", b"", idle_s=0.01)


def test_a_gzip_body_has_the_same_limit_once_it_is_unpacked() -> None:
    packed = {"content-encoding": "gzip"}
    data = gzip.compress(b"1234567890")
    limit = len(data)
    read(data[:3], data[3:], headers=packed, max_bytes=limit)
    with pytest.raises(BodyTooLarge):
        read(gzip.compress(bytes(limit + 1)), headers=packed, max_bytes=limit)
    with pytest.raises(InvalidValue, match="ends early"):
        read(data[:-1], headers=packed, max_bytes=limit)
    with pytest.raises(InvalidValue, match="ends early"):
        read(data[:1], headers=packed)


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, identity"])
def test_a_body_in_another_encoding_is_rejected(encoding: str) -> None:
    with pytest.raises(UnsupportedBody, match="send gzip"):
        read(b"1", headers={"content-encoding": encoding})


def test_json_log_lines_carry_the_extra_fields() -> None:
    record = logging.makeLogRecord({"msg": "Recorded %s", "args": ("it",), "action": "ingest", "job_id": "batch_1"})
    line = JsonFormatter().format(record)
    assert '"message": "Recorded it"' in line
    assert '"action": "ingest", "job_id": "batch_1"' in line
    assert "\n" not in line
