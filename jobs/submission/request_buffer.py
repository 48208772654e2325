"""Requests between the check of a submission and its recording: packed, in a file if they are many.

A job is recorded only when all of it is known to be good, so its requests wait; as objects they would take many times
the memory of what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from tempfile import SpooledTemporaryFile
from typing import Self

from pydantic_core import from_json, to_json

from storage.records import NewRequest, RequestFailure

_IN_MEMORY_BYTES = 1_000_000


class RequestBuffer:
    """Requests in the order in which they came, to be read once."""

    def __init__(self) -> None:
        """Start with none."""
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115  # closed at the end of the `with`
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def add(self, request: NewRequest) -> None:
        """Put a request behind the others."""
        failure = None if request.failure is None else asdict(request.failure)
        packed = to_json((request.custom_id, request.body, failure, request.tokens, request.timeout_s))
        self._file.write(packed + b"\n")  # JSON has no newline of its own in strings
        self._count += 1

    def requests(self) -> Iterator[NewRequest]:
        """Yield them again, each with the bytes that it takes."""
        self._file.seek(0)
        for line in self._file:
            custom_id, body, failure, tokens, timeout_s = from_json(line)
            yield NewRequest(
                custom_id,
                body,
                None if failure is None else RequestFailure(**failure),
                tokens,
                timeout_s,
                size_bytes=len(line),
            )
