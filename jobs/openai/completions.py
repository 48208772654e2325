"""Build OpenAI response objects from database rows: whole completions, or the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.messages import CHAT_ENDPOINT, AnswerFormat
from jobs.openai.answers import AnswerDelta, split_answer
from jobs.openai.logprobs import logprobs_object
from storage.queries import ChoiceView, OutputView

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """The fields that a completion and all its chunks share."""

    id: str
    endpoint: str
    model: str
    created: int

    @property
    def chat(self) -> bool:
        """True on the chat endpoint."""
        return self.endpoint == CHAT_ENDPOINT

    def object(self, kind: str, choices: list[Json], **more: Any) -> Json:
        """Return the header's fields (id, model, time, …) together with these."""
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
    """Return a whole completion: `chat.completion` or `text_completion`."""
    kind = "chat.completion" if header.chat else "text_completion"
    form = answer_format(output)
    choices = [_choice(header, choice, form) for choice in output.choices]
    return header.object(kind, choices, usage=usage(output))


def chunk(header: ResponseHeader, index: int, finish_reason: str | None = None, **new: str) -> Json:
    """Return a chunk of a stream with the new fields: role and content of a chat message, or text."""
    base: Json = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    content: Json = {"delta": new} if header.chat else {"text": "", **new}
    return header.object(_chunk_kind(header), [base | content])


def logprobs_chunks(header: ResponseHeader, output: OutputView) -> Iterator[Json]:
    """Yield a chunk with the log-probabilities of each choice that requested them; sent after the text."""
    for choice in output.choices:
        logprobs = logprobs_object(header.endpoint, choice.logprobs, choice.text)
        if logprobs is not None:
            content: Json = {"delta": {}} if header.chat else {"text": ""}
            base = {"index": choice.choice_index, "logprobs": logprobs, "finish_reason": None}
            yield header.object(_chunk_kind(header), [base | content])


def usage_chunk(header: ResponseHeader, output: OutputView) -> Json:
    """Return the last chunk of a stream with `include_usage`: no choices, and the token counts."""
    return header.object(_chunk_kind(header), [], usage=usage(output))


def _chunk_kind(header: ResponseHeader) -> str:
    return "chat.completion.chunk" if header.chat else "text_completion"


def answer_format(output: OutputView) -> AnswerFormat | None:
    """Return how the texts of a request split; None: they are the content."""
    return None if output.answer_format is None else AnswerFormat.model_validate(output.answer_format)


def answer_parts(form: AnswerFormat | None, text: str) -> Json:
    """Return `content` and, if the format has reasoning, `reasoning_content` and the same as `reasoning`."""
    answer = split_answer(form, text)
    shown = form is not None and form.reasoning is not None and form.reasoning.shown
    reasoning = {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning} if shown else {}
    return {"content": answer.content, **reasoning}


def delta_parts(delta: AnswerDelta) -> Iterator[dict[str, str]]:
    """Yield the fields of the chunks for a delta, one part per chunk, in the order of the text."""
    if delta.reasoning:
        yield {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        yield {"content": delta.content}


def _choice(header: ResponseHeader, choice: ChoiceView, form: AnswerFormat | None) -> Json:
    content: Json = {"text": choice.text}
    if header.chat:
        content = {"message": {"role": "assistant", **answer_parts(form, choice.text), "refusal": None}}
    logprobs = logprobs_object(header.endpoint, choice.logprobs, choice.text)
    return {"index": choice.choice_index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def usage(view: OutputView) -> Json:
    """Return the token counts of a request; its prompt counts once for all choices."""
    prompt, completion, reasoning = view.prompt_tokens, view.completion_tokens, view.reasoning_tokens
    counts: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts if reasoning is None else counts | {"completion_tokens_details": {"reasoning_tokens": reasoning}}
