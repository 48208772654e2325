"""Build the items of the Responses API: what a response was asked, and what it answered.

The ids of items derive from the response's id, so that a response has the same ids whenever it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from jobs.messages import ChatMessage
from jobs.openai.completions import call_id
from jobs.openai.logprobs import Stored, logprobs_object

Json = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

_PREFIX: Final = "resp_"
_OF_A_JOB: Final = re.compile(r"resp_(?P<job_id>.+)_(?P<index>\d{1,9})", re.DOTALL)
_ITEM_ID: Final = re.compile(r"(?:msg|rs|fc)_(?P<response>.+)_\d{1,9}", re.DOTALL)


def response_id(job_id: str, request_index: int) -> str:
    """Return the id of the response of a request. A job that is a single response has its id."""
    return job_id if job_id.startswith(_PREFIX) else f"{_PREFIX}{job_id}_{request_index}"


def request_of(response_id: str) -> tuple[str, int]:
    """Return job id and request index of a response."""
    found = _OF_A_JOB.fullmatch(response_id)
    return (response_id, 0) if found is None else (found["job_id"], int(found["index"]))


def call_id_of(response_id: str, call: int) -> str:
    """Return the id of a call in an answer, by its index."""
    return call_id(*request_of(response_id), 0, call)


def item_id(kind: str, response_id: str, index: int) -> str:
    """Return the id of an item: `kind` is msg, rs, fc or in."""
    return f"{kind}_{response_id.removeprefix(_PREFIX)}_{index}"


def response_of_item(identity: str) -> str | None:
    """Return the id of the response that an item of an output belongs to; None for other ids."""
    found = _ITEM_ID.fullmatch(identity)
    return None if found is None else _PREFIX + found["response"]


def message_item(identity: str, status: ItemStatus, content: Sequence[Json]) -> Json:
    """Return the message of the assistant."""
    return {"id": identity, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def text_part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    """Return the content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_item(identity: str, status: ItemStatus, content: Sequence[Json]) -> Json:
    """Return the reasoning before an answer. It is returned itself, so it has no summary."""
    return {"id": identity, "type": "reasoning", "status": status, "summary": [], "content": list(content)}


def reasoning_part(text: str) -> Json:
    """Return the content of a reasoning item."""
    return {"type": "reasoning_text", "text": text}


def call_item(identity: str, status: ItemStatus, call_id: str, name: str, arguments: str) -> Json:
    """Return a call of a function."""
    return {
        "id": identity,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def text_logprobs(stored: Sequence[Stored] | None) -> list[Json]:
    """Return log-probabilities in the form of output texts, whose bytes are never null."""
    found = logprobs_object("", stored, "")
    return [] if found is None else [_scored(token) for token in found["content"]]


def input_items(response_id: str, messages: Sequence[ChatMessage]) -> Iterator[Json]:
    """Yield the items of a conversation, in order."""
    items = (item for message in messages for item in _items_of(message))
    for index, item in enumerate(items):
        yield {"id": item_id("in", response_id, index), "status": "completed", **item}


def _items_of(message: ChatMessage) -> Iterator[Json]:
    """Yield the items of a message, without id and status."""
    if message.role == "tool" and message.tool_call_id is not None:
        yield {"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content}
    elif message.role == "assistant":
        if message.content or not message.tool_calls:
            yield {"type": "message", "role": "assistant", "content": [text_part(message.content)]}
        for call in message.tool_calls:
            yield {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
    else:
        role = "user" if message.role == "tool" else message.role
        yield {"type": "message", "role": role, "content": [{"type": "input_text", "text": message.content}]}


def _scored(token: Json) -> Json:
    scored = token | {"bytes": token["bytes"] or []}
    if "top_logprobs" in token:
        scored["top_logprobs"] = [_scored(other) for other in token["top_logprobs"]]
    return scored
