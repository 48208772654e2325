"""`/v1/responses`: create, read, stream, cancel and delete responses, in the format of OpenAI's Responses API.

A response is a job of one request with the same id, or a request of a batch. Its caller waits for it, or reads it later
if it is a background response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.auth.stream_limits import StreamSlot, StreamSlotIfAsked
from jobs.api.calls import call_fields, call_output, create_call, drain, follow_call, next_text, or_disconnect
from jobs.api.dependencies import CurrentServices, Services, cancel_job, delete_job
from jobs.api.http.body import Body
from jobs.api.http.event_stream import event_stream
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import ERRORS, RESPONSE_BODY
from jobs.api.schemas.replies import ResponseDeleted
from jobs.api.schemas.route_responses import INPUT_ITEMS, RESPONSE, STREAMED_RESPONSE, responses
from jobs.api.submissions import require_json
from jobs.api.write_threads import run_write
from jobs.errors import BasicError, InvalidValue, NotCancellable, NotDeletable, NotFound
from jobs.json_lines import json_line
from jobs.messages import RESPONSES_ENDPOINT, GenerationRequest, PartialEvent
from jobs.openai.answer_words import WordParser
from jobs.openai.response_events import ResponseEvents
from jobs.openai.response_items import input_items, request_of
from jobs.openai.response_object import StoredResponse, response_error, response_object
from jobs.streaming.hub import PING
from jobs.streaming.sse import decode_events
from jobs.submission.values import boolean
from storage import queries
from storage.event_log import Cursor
from storage.queries import JobView, RequestView

router = APIRouter(prefix=RESPONSES_ENDPOINT, tags=["responses"], responses=ERRORS)

Json = dict[str, Any]

_CANCEL_WAIT_S = 5.0  # until a worker has released a cancelled response


@dataclass(frozen=True, slots=True)
class _FoundResponse:
    """A response with its job and request."""

    stored: StoredResponse
    job: JobView
    index: int
    request: RequestView

    def object(self) -> Json:
        """Return the Response object."""
        return response_object(self.stored, self.request.status, self.request.output, self.request.finished_at)


@router.post(
    "", response_model=None, openapi_extra=RESPONSE_BODY, responses=STREAMED_RESPONSE, dependencies=[StreamSlot]
)
async def create_response(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Answer one conversation, with priority over batches; in the background, answer at once and generate as a job."""
    require_json(request.headers)
    async with services.bodies.received(request, services.settings.max_json_bytes) as body:
        found, stream = await run_write(_accept, services, body, request, caller)
    if found.stored.options.background:
        return event_stream(_replayed(services, found, caller)) if stream else JSONResponse(found.object())
    events = follow_call(services, found.job.id)
    if not stream:
        await or_disconnect(request, drain(events))
        return await run_in_threadpool(_whole, services, found, caller)
    # Wait for the first text before sending a status: the worker may still reject the request.
    first = await or_disconnect(request, next_text(events))
    if first is None:
        await run_in_threadpool(call_output, services, found.job.id)
    return event_stream(_lines(services, found, caller, _prepended(first, events)))


def _accept(services: Services, body: Body, request: Request, caller: Caller) -> tuple[_FoundResponse, bool]:
    """Store the response as a job; return it, and whether to stream it."""
    fields = call_fields(request, body)
    stream, waits = boolean(fields.get("stream", False), "stream"), fields.get("background") is not True
    metadata = fields.get("metadata")
    job_id = create_call(services, fields, request, caller, RESPONSES_ENDPOINT, waits=waits, metadata=metadata)
    return _find(services, job_id, caller), stream


def _find(services: Services, response_id: str, caller: Caller) -> _FoundResponse:
    """Return a response; raise NotFound for an unknown id or one of another caller."""
    job_id, index = request_of(response_id)
    with services.database.read() as session:
        job = queries.job(session, job_id, caller.sees)
        request = None
        if job is not None and job.endpoint == RESPONSES_ENDPOINT:
            request = queries.request(session, job_id, index)
    if job is None or request is None or request.body is None:
        raise NotFound(f"There is no response {response_id[:80]!r}.", param="id")
    stored = StoredResponse(response_id, job.model, job.created_at, GenerationRequest.model_validate(request.body))
    return _FoundResponse(stored, job, index, request)


def _existing(response_id: str, services: CurrentServices, caller: CurrentCaller) -> _FoundResponse:
    found = _find(services, response_id, caller)
    if not found.stored.options.store:
        raise NotFound(f"The response {response_id[:80]!r} was created with store: false.", param="id")
    return found


ExistingResponse = Annotated[_FoundResponse, Depends(_existing)]


@router.get("/{response_id}", response_model=None, responses=STREAMED_RESPONSE, dependencies=[StreamSlotIfAsked])
async def retrieve_response(
    found: ExistingResponse,
    services: CurrentServices,
    caller: CurrentCaller,
    stream: bool = False,
    starting_after: Annotated[
        int, Query(ge=-1, le=2**31 - 1, description="With stream: start after the event with this number.")
    ] = -1,
) -> Response:
    """Read one response. With `stream`, send its events from the first, and new ones until it ends."""
    if stream:
        return event_stream(_replayed(services, found, caller, starting_after))
    return JSONResponse(found.object())


@router.post("/{response_id}/cancel", response_model=None, responses=RESPONSE)
async def cancel_response(found: ExistingResponse, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Cancel a response. May be repeated; 409 if it has ended otherwise, and for a request of a batch."""
    if found.job.id != found.stored.id:
        raise NotCancellable(f"This response belongs to {found.job.id}. Cancel that.")
    await run_write(cancel_job, services, found.job, caller, "response")
    try:
        async with asyncio.timeout(_CANCEL_WAIT_S):
            async for _ in _events(services, found):
                pass
    except TimeoutError:
        pass  # its status says so
    return JSONResponse((await run_in_threadpool(_find, services, found.stored.id, caller)).object())


@router.delete("/{response_id}", response_model=None, responses=responses(ResponseDeleted, 404, 409))
async def delete_response(found: ExistingResponse, services: CurrentServices) -> Response:
    """Erase a response that has ended; 409 for one that still runs, and for a request of a batch."""
    if found.job.id != found.stored.id:
        raise NotDeletable(f"This response belongs to {found.job.id}. Delete that: DELETE /v1/jobs/{found.job.id}.")
    await run_write(delete_job, services, found.job, noun="response")
    return JSONResponse({"id": found.stored.id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items", response_model=None, responses=INPUT_ITEMS)
async def list_input_items(
    found: ExistingResponse,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the conversation that a response has read, without its instructions. `after`: last id of the page before."""
    messages = found.stored.request.messages or ()
    items = list(input_items(found.stored.id, messages[1 if found.stored.options.instructions else 0 :]))
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidValue("Unknown item id in `after`.", param="after")
        items = items[ids.index(after) + 1 :]
    return JSONResponse(serializers.page(items[:limit], len(items) > limit))


def _whole(services: Services, found: _FoundResponse, caller: Caller) -> Response:
    call_output(services, found.job.id)  # raises its error
    return JSONResponse(_find(services, found.stored.id, caller).object())


async def _prepended(
    first: PartialEvent | None, events: AsyncGenerator[PartialEvent]
) -> AsyncGenerator[PartialEvent | None]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


async def _events(services: Services, found: _FoundResponse) -> AsyncGenerator[PartialEvent | None]:
    """Yield the events of a stored response until it ends, and None when it is silent."""
    async with aclosing(services.hub.follow(found.job.id, Cursor())) as batches:
        async for batch in batches:
            if batch == PING:
                yield None
            for event in decode_events(batch):
                if event.index == found.index:
                    yield event
                    if event.type in ("finished", "failed"):
                        return


def _replayed(services: Services, found: _FoundResponse, caller: Caller, after: int = -1) -> AsyncIterator[str]:
    return _lines(services, found, caller, _events(services, found), after)


async def _lines(
    services: Services,
    found: _FoundResponse,
    caller: Caller,
    events: AsyncGenerator[PartialEvent | None],
    after: int = -1,
) -> AsyncIterator[str]:
    """Yield the server-sent events of a response whose number is above `after`."""
    async with aclosing(_certain_events(services, found, caller, events)) as certain:
        async for some in certain:
            if some is None:
                yield PING.decode()
            elif lines := _encode(event for event in some if event["sequence_number"] > after):
                yield lines


async def _certain_events(
    services: Services, found: _FoundResponse, caller: Caller, events: AsyncGenerator[PartialEvent | None]
) -> AsyncGenerator[list[Json] | None]:
    """Yield the events of a response as they become certain, and None when it is silent. An error is the last one."""
    opening = response_object(found.stored, "queued")
    stream, parser = ResponseEvents(opening), None
    sent = 0
    yield stream.start()
    try:
        async with aclosing(events):
            async for event in events:
                if event is None:
                    yield None
                elif event.type in ("tokens", "finished"):
                    parser = parser or WordParser(event.answer_format)
                    text = event.text[sent:] if event.snapshot else event.text
                    sent += len(text)
                    yield stream.add(parser.push(text))
                    if event.type == "finished":
                        yield stream.add(parser.finish())
        ended = (await run_in_threadpool(_find, services, found.stored.id, caller)).object()
    except BasicError as failed:
        ended = opening | {"status": "failed", "error": response_error(failed.status_code, failed.message)}
    yield stream.end(ended)


def _encode(events: Iterable[Json]) -> str:
    return "".join(f"event: {event['type']}\ndata: {json_line(event)}\n\n" for event in events)


__all__ = ["router"]
