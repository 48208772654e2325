"""Build the events of a streamed response.

The events and their numbers depend on the answer alone, not on how its text arrived: its deltas are those of words
(`jobs.openai.answer_words`). So any API server can send a stream again, from any number on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.openai.answer_words import AnswerPart, continues, delta_parts
from jobs.openai.answers import AnswerDelta
from jobs.openai.response_items import (
    ItemStatus,
    call_id_of,
    call_item,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
)

Json = dict[str, Any]


class _Item(Protocol):
    """An item that is being written: its events, without numbers."""

    @property
    def id(self) -> str:
        """Return its id."""

    def whole(self, status: ItemStatus, text: str) -> Json:
        """Return the item with this text."""

    def opened(self) -> list[Json]:
        """Return the events that follow `output_item.added`."""

    def delta(self, text: str) -> Json:
        """Return the event for new text."""

    def closed(self, item: Json) -> list[Json]:
        """Return the events that precede `output_item.done` of this item."""


@dataclass(frozen=True, slots=True)
class _OpenMessage:
    """The text of the answer."""

    id: str

    def whole(self, status: ItemStatus, text: str) -> Json:
        return message_item(self.id, status, [text_part(text)] if text else [])

    def opened(self) -> list[Json]:
        return [_part_event("added", text_part(""))]

    def delta(self, text: str) -> Json:
        return {"type": "response.output_text.delta", "content_index": 0, "delta": text, "logprobs": []}

    def closed(self, item: Json) -> list[Json]:
        (part,) = item["content"]
        more = {"text": part["text"], "logprobs": part["logprobs"]}
        return [{"type": "response.output_text.done", "content_index": 0, **more}, _part_event("done", part)]


@dataclass(frozen=True, slots=True)
class _OpenReasoning:
    """The reasoning before the answer."""

    id: str

    def whole(self, status: ItemStatus, text: str) -> Json:
        return reasoning_item(self.id, status, [reasoning_part(text)] if text else [])

    def opened(self) -> list[Json]:
        return [_part_event("added", reasoning_part(""))]

    def delta(self, text: str) -> Json:
        return {"type": "response.reasoning_text.delta", "content_index": 0, "delta": text}

    def closed(self, item: Json) -> list[Json]:
        (part,) = item["content"]
        done = {"type": "response.reasoning_text.done", "content_index": 0, "text": part["text"]}
        return [done, _part_event("done", part)]


@dataclass(frozen=True, slots=True)
class _OpenCall:
    """A call of a function."""

    id: str
    call_id: str
    name: str

    def whole(self, status: ItemStatus, text: str) -> Json:
        return call_item(self.id, status, self.call_id, self.name, text)

    def opened(self) -> list[Json]:
        return []

    def delta(self, text: str) -> Json:
        return {"type": "response.function_call_arguments.delta", "delta": text}

    def closed(self, item: Json) -> list[Json]:
        more = {"name": self.name, "arguments": item["arguments"]}
        return [{"type": "response.function_call_arguments.done", **more}]


@dataclass(slots=True)
class _Writing:
    """The open item, and its text so far."""

    item: _Item
    index: int
    part: AnswerPart  # its first
    text: str = ""


class ResponseEvents:
    """The events of one response, in order. Each method returns those that are now certain."""

    def __init__(self, response: Json) -> None:
        """Take the Response object before its output."""
        self._response = response
        self._number = 0
        self._items = 0
        self._writing: _Writing | None = None

    def start(self) -> list[Json]:
        """Return the first events. A background response is queued first."""
        statuses = ["queued", "in_progress"] if self._response["background"] else ["in_progress"]
        told = zip(["created", *statuses], [statuses[0], *statuses], strict=True)
        return [
            self._numbered({"type": f"response.{name}", "response": self._response | {"status": status}})
            for name, status in told
        ]

    def add(self, deltas: Iterable[AnswerDelta]) -> list[Json]:
        """Add what the answer says next."""
        return [event for delta in deltas for part in delta_parts(delta) for event in self._add(part)]

    def end(self, response: Json) -> list[Json]:
        """Return the last events, from the Response object as it has ended."""
        events: list[Json] = []
        status = response["status"] if response["status"] in ("completed", "incomplete") else "failed"
        if status != "failed":
            first = self._items - (self._writing is not None)
            for item in response["output"][first:]:
                if self._writing is None:
                    empty = AnswerPart("")  # the only item without text
                    events += self._open(self._item_of(empty), empty)
                events += self._close(item)
        return [*events, self._numbered({"type": f"response.{status}", "response": response})]

    def _add(self, part: AnswerPart) -> list[Json]:
        events: list[Json] = []
        if self._writing is not None and not continues(self._writing.part, part):
            events += self._close(self._writing.item.whole("completed", self._writing.text))
        if self._writing is None:
            events += self._open(self._item_of(part), part)
        assert self._writing is not None
        self._writing.text += part.text
        return [*events, self._located(self._writing, self._writing.item.delta(part.text))] if part.text else events

    def _item_of(self, part: AnswerPart) -> _Item:
        """Return the item that a part begins."""
        identity = self._response["id"]
        if part.call is not None:
            return _OpenCall(item_id("fc", identity, self._items), call_id_of(identity, part.call), part.name)
        if part.is_reasoning:
            return _OpenReasoning(item_id("rs", identity, self._items))
        return _OpenMessage(item_id("msg", identity, self._items))

    def _open(self, item: _Item, part: AnswerPart) -> list[Json]:
        self._writing = writing = _Writing(item, self._items, part)
        self._items += 1
        added = {"type": "response.output_item.added", "item": item.whole("in_progress", "")}
        return [
            self._numbered(added | {"output_index": writing.index}),
            *(self._located(writing, event) for event in item.opened()),
        ]

    def _close(self, item: Json) -> list[Json]:
        """Close the open item; `item` is how it ends."""
        writing, self._writing = self._writing, None
        assert writing is not None
        events = [self._located(writing, event) for event in writing.item.closed(item)]
        done = {"type": "response.output_item.done", "item": item, "output_index": writing.index}
        return [*events, self._numbered(done)]

    def _located(self, writing: _Writing, event: Json) -> Json:
        return self._numbered(event | {"item_id": writing.item.id, "output_index": writing.index})

    def _numbered(self, event: Json) -> Json:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        return numbered


def _part_event(what: str, part: Json) -> Json:
    return {"type": f"response.content_part.{what}", "content_index": 0, "part": part}
