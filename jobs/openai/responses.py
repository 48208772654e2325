"""Answers in OpenAI's shapes: whole, or in the chunks of a stream. Rows of the record in, JSON objects out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.messages import CHAT_ENDPOINT
from jobs.openai.logprobs import logprobs_object
from storage.queries import ChoiceView, OutputView

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseHeader:
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
        """Return an object with this header."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
            **more,
        }


def answer(header: ResponseHeader, output: OutputView) -> Json:
    """Return a request's whole answer: `chat.completion` or `text_completion`."""
    kind = "chat.completion" if header.chat else "text_completion"
    choices = [_choice(header, choice) for choice in output.choices]
    return header.over(kind, choices, usage=usage(output))


def chunk(header: ResponseHeader, index: int, finish_reason: str | None = None, **news: str) -> Json:
    """Return a piece of a stream: for a chat what is new of the message (role, content), else what is new (text)."""
    place: Json = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    content: Json = {"delta": news} if header.chat else {"text": "", **news}
    return header.over(_chunk_kind(header), [place | content])


def logprobs_chunks(header: ResponseHeader, output: OutputView) -> Iterator[Json]:
    """Yield the log-probabilities of each choice that wants them: a stream tells them behind its text."""
    for choice in output.choices:
        logprobs = logprobs_object(header.endpoint, choice.logprobs, choice.text)
        if logprobs is not None:
            content: Json = {"delta": {}} if header.chat else {"text": ""}
            place = {"index": choice.choice_index, "logprobs": logprobs, "finish_reason": None}
            yield header.over(_chunk_kind(header), [place | content])


def usage_chunk(header: ResponseHeader, output: OutputView) -> Json:
    """Return the piece that ends a stream if it was asked for: no choices, and the tokens of all."""
    return header.over(_chunk_kind(header), [], usage=usage(output))


def _chunk_kind(header: ResponseHeader) -> str:
    return "chat.completion.chunk" if header.chat else "text_completion"


def _choice(header: ResponseHeader, choice: ChoiceView) -> Json:
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    content: Mapping[str, Any] = {"message": message} if header.chat else {"text": choice.text}
    logprobs = logprobs_object(header.endpoint, choice.logprobs, choice.text)
    return {"index": choice.choice_index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def usage(view: OutputView) -> Json:
    """Return the tokens of a request: a prompt is counted once, whatever the number of choices."""
    prompt, completion = view.prompt_tokens, view.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
