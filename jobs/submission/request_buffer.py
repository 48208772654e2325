"""Buffer the parsed requests of a submission as JSON, in a temporary file if they are large.

A job is stored only after its last request is parsed. Kept as objects, the requests would take many times the memory of
the body.
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
    """A queue of requests: add all, then read them once, in order."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115  # closed at the end of the `with`
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def add(self, request: NewRequest) -> None:
        """Append a request."""
        failure = None if request.failure is None else asdict(request.failure)
        fields = (request.tokens, request.prompt_tokens, request.timeout_s, request.identity)
        packed = to_json((request.custom_id, request.body, failure, *fields))
        self._file.write(packed + b"\n")  # JSON strings contain no newline
        self._count += 1

    def requests(self) -> Iterator[NewRequest]:
        """Yield the requests, each with its size in bytes."""
        self._file.seek(0)
        for line in self._file:
            custom_id, body, failure, tokens, prompt_tokens, timeout_s, identity = from_json(line)
            yield NewRequest(
                custom_id,
                body,
                None if failure is None else RequestFailure(**failure),
                tokens,
                prompt_tokens,
                timeout_s,
                size_bytes=len(line),
                identity=identity,
            )
