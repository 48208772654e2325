"""Answers in OpenAI's shapes: whole, or in the chunks of a stream. Rows of the record in, JSON objects out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.answers import Answers, usage
from jobs.messages import CHAT_ENDPOINT
from storage.queries import OutputView

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands above every answer, and above every chunk of it."""

    id: str
    endpoint: str
    model: str
    created: int

    @property
    def chat(self) -> bool:
        """True for messages, false for plain text."""
        return self.endpoint == CHAT_ENDPOINT

    def over(self, kind: str, choices: list[Json], **more: Any) -> Json:
        """Return an object with this heading."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
            **more,
        }


def answer(heading: Heading, output: OutputView) -> Json:
    """Return a request's whole answer, as the line of a batch would have it, under the heading of the call."""
    whole = Answers(heading.id, heading.endpoint, heading.model).body(output)
    return whole | {"id": heading.id, "created": heading.created}


def chunk(heading: Heading, index: int, finish_reason: str | None = None, **news: str) -> Json:
    """Return a piece of a stream: for a chat what is new of the message (role, content), else what is new (text)."""
    place: Json = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    content: Json = {"delta": news} if heading.chat else {"text": "", **news}
    return heading.over(_chunk_kind(heading), [place | content])


def usage_chunk(heading: Heading, output: OutputView) -> Json:
    """Return the piece that ends a stream if it was asked for: no choices, and the tokens of all."""
    return heading.over(_chunk_kind(heading), [], usage=usage(output))


def _chunk_kind(heading: Heading) -> str:
    return "chat.completion.chunk" if heading.chat else "text_completion"
