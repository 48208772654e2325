"""Create and follow a call, a job of one request whose caller waits: its events, its output, its cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import islice
from typing import Any, TypeVar

from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect

from jobs.api.auth.caller import Caller
from jobs.api.dependencies import Services
from jobs.api.http.body import Body
from jobs.api.http.paths import deployment
from jobs.api.submissions import json_object
from jobs.errors import AnswerTooLate, RequestFailed
from jobs.messages import Endpoint, PartialEvent
from jobs.streaming.sse import decode_events
from jobs.submission.intake import Submission, create_interactive_job, new_call_id
from jobs.submission.items import Item
from jobs.submission.parameters.sampling import body_fields
from jobs.tracing import submit_span
from storage import queries, writes
from storage.event_log import Cursor
from storage.queries import OutputView

log = logging.getLogger(__name__)

_cancels = ThreadPoolExecutor(4, "cancels")  # cancellations may wait for other writers

T = TypeVar("T")


def call_fields(request: Request, body: Body) -> dict[str, Any]:
    """Return the fields of a call's body. The model of an Azure path precedes that of the body."""
    fields = body_fields(json_object(body.open().read()))
    if (named := deployment(request.scope)) is not None:
        fields["model"] = named
    return fields


def create_call(
    services: Services,
    fields: dict[str, Any],
    request: Request,
    caller: Caller,
    endpoint: Endpoint,
    *,
    waits: bool = True,
    metadata: Any = None,
) -> str:
    """Store a call as a job and return its id; raise what is wrong with it. `waits`: its caller waits for it."""
    with submit_span(request.headers) as traceparent:
        submission = Submission(
            [Item(0, fields)],
            endpoint=endpoint,
            metadata=metadata,
            window_s=services.settings.interactive_timeout_s if waits else None,
            job_id=new_call_id(endpoint),
            api_key_id=caller.key_id,
            traceparent=traceparent,
        )
        return create_interactive_job(
            submission, database=services.database, notify=services.notify, settings=services.settings, waits=waits
        )


async def follow_call(services: Services, job_id: str) -> AsyncGenerator[PartialEvent]:
    """Yield the events of a call until it ends. Cancel the call if the caller stops iterating or the time is up."""
    loop = asyncio.get_running_loop()
    limit_s = services.settings.interactive_timeout_s
    ends_at = loop.time() + limit_s
    ended = False
    try:
        async with aclosing(services.hub.follow(job_id, Cursor())) as batches:
            while not ended:
                try:
                    async with asyncio.timeout_at(ends_at):
                        batch = await anext(batches)
                except TimeoutError as exc:
                    raise AnswerTooLate(f"The answer was not complete within {limit_s:g} s.") from exc
                for event in decode_events(batch):
                    ended = event.status is not None and event.status.final
                    yield event
    finally:
        if not ended:
            # Not awaited: this task may be being cancelled itself.
            loop.run_in_executor(_cancels, _cancel, services, job_id)


async def drain(events: AsyncGenerator[PartialEvent]) -> None:
    """Wait for the last event."""
    async with aclosing(events):
        async for _ in events:
            pass


async def next_text(events: AsyncGenerator[PartialEvent]) -> PartialEvent | None:
    """Return the next event with text or a finish reason; None at the end."""
    async for event in events:
        if event.type in ("tokens", "finished"):
            return event
    return None


async def or_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; raise ClientDisconnect as soon as the client disconnects."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def call_output(services: Services, job_id: str) -> OutputView:
    """Return the output of a call that has ended; raise RequestFailed if it has none."""
    with services.database.read() as session:
        output = next(islice(queries.outputs(session, job_id), 1), None)
    if output is None:
        raise RequestFailed
    if output.error_message is not None:
        raise RequestFailed(
            output.error_message,
            code=output.error_code,
            status_code=output.error_status_code,
            param=output.error_param,
        )
    return output


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel(services: Services, job_id: str) -> None:
    try:
        with services.database.write() as session:
            writes.request_cancel(session, job_id)
    except SQLAlchemyError as exc:
        about = {"action": "cancel_failed", "job_id": job_id}
        log.warning("Can't cancel call %s: %s", job_id, exc, extra=about)
