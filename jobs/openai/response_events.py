"""Build the events of a streamed response.

The events and their numbers depend on the answer alone, not on how its text arrived: texts are cut into words. So any
API server can send a stream again, from any number on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from jobs.messages import AnswerFormat
from jobs.openai.answers import AnswerDelta, AnswerParser
from jobs.openai.response_items import (
    ItemStatus,
    call_item,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
)

Json = dict[str, Any]

_MAX_CHARS: Final = 16  # of a word, and of the white space before it
_WORD: Final = re.compile(rf"\s{{0,{_MAX_CHARS}}}(\S{{0,{_MAX_CHARS}}})")


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
class _Message:
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
class _Reasoning:
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
class _Call:
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
    text: str = ""


class WordParser:
    """Splits a text as `AnswerParser` does, but word by word, so that its deltas depend on the text alone."""

    def __init__(self, form: AnswerFormat | None) -> None:
        """Start before the first character of the text."""
        self._parser = AnswerParser(form)
        self._held = ""  # the end of the text, whose last word may not be complete

    def push(self, text: str) -> list[AnswerDelta]:
        """Add text; return the deltas of the words that are complete."""
        self._held += text
        deltas = []
        while self._held:
            found = _WORD.match(self._held)
            assert found is not None
            if found.end() == len(self._held) and len(found[1]) < _MAX_CHARS:
                break
            self._held = self._held[found.end() :]
            deltas.append(self._parser.push(found[0]))
        return deltas

    def finish(self) -> list[AnswerDelta]:
        """Return the deltas of the rest: the text has ended."""
        return [self._parser.push(self._held), self._parser.finish()]


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
        events: list[Json] = []
        for delta in deltas:
            if delta.reasoning:
                events += self._add(_Reasoning, "rs", delta.reasoning)
            if delta.content:
                events += self._add(_Message, "msg", delta.content)
        return events

    def end(self, response: Json) -> list[Json]:
        """Return the last events, from the Response object as it has ended."""
        events: list[Json] = []
        status = response["status"] if response["status"] in ("completed", "incomplete") else "failed"
        if status != "failed":
            first = self._items - (self._writing is not None)
            for item in response["output"][first:]:
                if self._writing is None:
                    events += self._open(_item_of(item))
                events += self._close(item)
        return [*events, self._numbered({"type": f"response.{status}", "response": response})]

    def _add(self, kind: type[_Message | _Reasoning], prefix: str, text: str) -> list[Json]:
        events: list[Json] = []
        if self._writing is not None and not isinstance(self._writing.item, kind):
            events += self._close(self._writing.item.whole("completed", self._writing.text))
        if self._writing is None:
            events += self._open(kind(item_id(prefix, self._response["id"], self._items)))
        assert self._writing is not None
        self._writing.text += text
        return [*events, self._located(self._writing, self._writing.item.delta(text))]

    def _open(self, item: _Item) -> list[Json]:
        self._writing = writing = _Writing(item, self._items)
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


def _item_of(item: Json) -> _Item:
    """Return the item to write for one of a Response object."""
    if item["type"] == "function_call":
        return _Call(item["id"], item["call_id"], item["name"])
    return (_Reasoning if item["type"] == "reasoning" else _Message)(item["id"])
