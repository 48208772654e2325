"""Build the items of the Responses API: what a response was asked, and what it answered.

The ids of items derive from the response's id, so that a response has the same ids whenever it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from jobs.messages import ChatMessage
from jobs.openai.logprobs import Stored, logprobs_object

Json = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

_PREFIX: Final = "resp_"
_ITEM_ID: Final = re.compile(r"(?:msg|rs|fc)_(?P<response>.+)_\d{1,9}", re.DOTALL)


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
    for index, message in enumerate(messages):
        identity = item_id("in", response_id, index)
        if message.role == "assistant":
            yield message_item(identity, "completed", [text_part(message.content)])
        else:
            yield {
                "id": identity,
                "type": "message",
                "status": "completed",
                "role": "user" if message.role == "tool" else message.role,
                "content": [{"type": "input_text", "text": message.content}],
            }


def _scored(token: Json) -> Json:
    scored = token | {"bytes": token["bytes"] or []}
    if "top_logprobs" in token:
        scored["top_logprobs"] = [_scored(other) for other in token["top_logprobs"]]
    return scored
