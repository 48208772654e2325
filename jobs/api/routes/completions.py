"""`/v1/chat/completions` and `/v1/completions`: answer single requests, whole or streamed.

Each request is a job of one request with priority over batches. If the client disconnects or the timeout expires, the
request is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.auth.stream_limits import StreamSlot
from jobs.api.calls import call_fields, call_output, create_call, drain, follow_call, next_text, or_disconnect
from jobs.api.dependencies import CurrentServices, Services, find_job
from jobs.api.http.body import Body
from jobs.api.http.event_stream import event_stream
from jobs.api.schemas.openapi import CHAT_BODY, COMPLETION_BODY, ERRORS
from jobs.api.schemas.route_responses import CHAT, TEXT
from jobs.api.submissions import require_json
from jobs.api.write_threads import run_write
from jobs.errors import BasicError, InvalidValue
from jobs.json_lines import json_line
from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, Endpoint, PartialEvent
from jobs.openai import completions
from jobs.openai.answers import STOP, AnswerParser
from jobs.openai.completions import ResponseHeader
from jobs.openai.errors import error_body
from jobs.submission.values import boolean

router = APIRouter(tags=["completions"], responses=ERRORS)


@router.post(CHAT_ENDPOINT, openapi_extra=CHAT_BODY, responses=CHAT, dependencies=[StreamSlot])
async def create_chat_completion(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Answer one chat, with priority over batches."""
    return await _answer(request, services, caller, CHAT_ENDPOINT)


@router.post(COMPLETIONS_ENDPOINT, openapi_extra=COMPLETION_BODY, responses=TEXT, dependencies=[StreamSlot])
async def create_completion(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Complete one prompt, with priority over batches."""
    return await _answer(request, services, caller, COMPLETIONS_ENDPOINT)


@dataclass(frozen=True, slots=True)
class _Call:
    """A stored call and its response options."""

    header: ResponseHeader
    stream: bool
    with_usage: bool


async def _answer(request: Request, services: Services, caller: Caller, endpoint: Endpoint) -> Response:
    require_json(request.headers)
    async with services.bodies.received(request, services.settings.max_json_bytes) as body:
        call = await run_write(_accept, services, body, request, caller, endpoint)
    events = follow_call(services, call.header.id)
    if not call.stream:
        await or_disconnect(request, drain(events))
        return await run_in_threadpool(_whole, services, call)
    # Wait for the first text before sending a status: the worker may still reject the request.
    first = await or_disconnect(request, next_text(events))
    if first is None:
        await run_in_threadpool(call_output, services, call.header.id)
    return event_stream(_lines(services, call, first, events))


def _accept(services: Services, body: Body, request: Request, caller: Caller, endpoint: Endpoint) -> _Call:
    """Store the call as a job; raise what is wrong with it."""
    fields = call_fields(request, body)
    stream, with_usage = _stream_options(fields)
    job_id = create_call(services, fields, request, caller, endpoint)
    job = find_job(services, job_id, caller)
    return _Call(ResponseHeader(job_id, endpoint, job.model, int(job.created_at), job_id), stream, with_usage)


def _stream_options(fields: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether to stream, and whether to end the stream with the token usage."""
    stream, options = boolean(fields.get("stream", False), "stream"), fields.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        raise InvalidValue("must be an object; include_usage is true or false", param="stream_options")
    if any(options.values()) and not stream:
        raise InvalidValue("requires stream: true", param="stream_options")
    return stream, bool(options.get("include_usage"))


async def _lines(
    services: Services, call: _Call, first: PartialEvent | None, events: AsyncGenerator[PartialEvent]
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer. Errors from here on are sent in the stream."""
    more = {"usage": None} if call.with_usage else {}
    try:
        async with aclosing(events):
            async for piece in _chunks(call.header, first, events):
                yield _line(piece | more)
        for line in await run_in_threadpool(_last_lines, services, call, more):
            yield line
        yield "data: [DONE]\n\n"
    except BasicError as failed:
        yield _line(error_body(failed.status_code, failed.message, failed.param, failed.code))


async def _chunks(
    header: ResponseHeader, first: PartialEvent | None, events: AsyncGenerator[PartialEvent]
) -> AsyncIterator[dict[str, Any]]:
    sent: dict[int, int] = {}  # choice -> characters read
    parsers: dict[int, AnswerParser] = {}
    event = first
    while event is not None:
        choice = event.choice
        if choice not in sent:
            sent[choice] = 0
            parsers[choice] = AnswerParser(event.answer_format)
            if header.chat:
                yield completions.chunk(header, choice, role="assistant", content="")
        text = event.text[sent[choice] :] if event.snapshot else event.text
        sent[choice] += len(text)
        for fields in _new_fields(header, choice, parsers[choice], text, ended=event.type == "finished"):
            yield completions.chunk(header, choice, **fields)
        if event.type == "finished":
            reason = parsers[choice].stop_reason if event.finish_reason == STOP else event.finish_reason
            yield completions.chunk(header, choice, reason)
        event = await next_text(events)


def _new_fields(
    header: ResponseHeader, choice: int, parser: AnswerParser, text: str, *, ended: bool
) -> Iterator[dict[str, Any]]:
    """Yield the fields of the chunks for new text of a choice, and for its end."""
    if not header.chat:
        yield from [{"text": text}] if text else []
        return
    call = partial(completions.call_id, header.job_id, 0, choice)
    yield from completions.delta_parts(parser.push(text), call)
    if ended:
        yield from completions.delta_parts(parser.finish(), call)


def _line(value: dict[str, Any]) -> str:
    return f"data: {json_line(value)}\n\n"


def _whole(services: Services, call: _Call) -> Response:
    return JSONResponse(completions.answer(call.header, call_output(services, call.header.id)))


def _last_lines(services: Services, call: _Call, more: dict[str, Any]) -> list[str]:
    """Return the last chunks of a stream, as requested: log-probabilities and token ids, and the token usage."""
    output = call_output(services, call.header.id)
    lines = [_line(piece | more) for piece in completions.detail_chunks(call.header, output)]
    return [*lines, _line(completions.usage_chunk(call.header, output))] if call.with_usage else lines


__all__ = ["router"]
