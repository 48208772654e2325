"""Build OpenAI response objects from database rows: whole completions, or the chunks of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.messages import CHAT_ENDPOINT, AnswerFormat
from jobs.openai.answers import STOP, AnswerDelta, split_answer
from jobs.openai.logprobs import logprobs_object
from jobs.openai.prompt_details import PromptDetails
from storage.queries import ChoiceView, OutputView

Json = dict[str, Any]
CallId = Callable[[int, int], str]  # of a call, by its choice and its index


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """The fields that a completion and all its chunks share."""

    id: str
    endpoint: str
    model: str
    created: int
    job_id: str

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
            "system_fingerprint": None,  # of a stream, until its text has ended
            **more,
        }


def answer(header: ResponseHeader, output: OutputView) -> Json:
    """Return a whole completion: `chat.completion` or `text_completion`."""
    kind = "chat.completion" if header.chat else "text_completion"
    form = answer_format(output)
    call = partial(call_id, header.job_id, output.request_index)
    choices = [_choice(header, choice, form, call) | _tokens(header, choice) for choice in output.choices]
    more = _prompt_of_chat(header, output)
    return header.object(kind, choices, usage=usage(output), system_fingerprint=output.numerics, **more)


def chunk(header: ResponseHeader, index: int, finish_reason: str | None = None, **new: Any) -> Json:
    """Return a chunk of a stream with the new fields: role and content of a chat message, or text."""
    base: Json = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    content: Json = {"delta": new} if header.chat else {"text": "", **new}
    return header.object(_chunk_kind(header), [base | content])


def detail_chunks(header: ResponseHeader, output: OutputView) -> Iterator[Json]:
    """Yield a chunk with the log-probabilities and token ids of each choice, if requested; sent after the text."""
    prompt = _prompt_of_chat(header, output)
    for choice in output.choices:
        logprobs, tokens = _logprobs(header, choice), _tokens(header, choice)
        if logprobs is not None or tokens or prompt:
            content: Json = {"delta": {}} if header.chat else {"text": ""}
            base = {"index": choice.choice_index, "logprobs": logprobs, "finish_reason": None}
            chosen = [base | content | tokens]
            yield header.object(_chunk_kind(header), chosen, system_fingerprint=output.numerics, **prompt)
            prompt = {}


def usage_chunk(header: ResponseHeader, output: OutputView) -> Json:
    """Return the last chunk of a stream with `include_usage`: no choices, and the token counts."""
    return header.object(_chunk_kind(header), [], usage=usage(output), system_fingerprint=output.numerics)


def _chunk_kind(header: ResponseHeader) -> str:
    return "chat.completion.chunk" if header.chat else "text_completion"


def answer_format(output: OutputView) -> AnswerFormat | None:
    """Return how the texts of a request split; None: they are the content."""
    return None if output.answer_format is None else AnswerFormat.model_validate(output.answer_format)


def choice_parts(form: AnswerFormat | None, choice: ChoiceView, call: CallId) -> Json:
    """Return the parts of a choice: `content`, `tool_calls` if it has any, and reasoning if the format has one.

    The reasoning is `reasoning_content`, and the same as `reasoning`.
    """
    answer = split_answer(form, choice.text)
    shown = form is not None and form.reasoning is not None and form.reasoning.shown
    reasoning = {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning} if shown else {}
    calls = [_call(call(choice.choice_index, n), *parts) for n, parts in enumerate(answer.calls)]
    return {"content": answer.content, **reasoning, **({"tool_calls": calls} if calls else {})}


def finish_reason(form: AnswerFormat | None, choice: ChoiceView) -> str:
    """Return why a choice ended: `tool_calls` after a call that the model chose."""
    called = form is not None and form.calls is not None and choice.finish_reason == STOP
    return split_answer(form, choice.text).stop_reason if called else choice.finish_reason


def delta_parts(delta: AnswerDelta, call: Callable[[int], str]) -> Iterator[Json]:
    """Yield the fields of the chunks for a delta, one part per chunk, in the order of the text.

    `call` returns the id of a call by its index.
    """
    if delta.reasoning:
        yield {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        yield {"content": delta.content}
    for part in delta.calls:
        new = {} if part.name is None else _call(call(part.index), part.name, "")
        arguments = {} if part.name is not None else {"function": {"arguments": part.arguments}}
        yield {"tool_calls": [{"index": part.index, **new, **arguments}]}


def call_id(job_id: str, request_index: int, choice: int, call: int) -> str:
    """Return the id of a call: the same however often its answer is read, whole or streamed."""
    return "call_" + hashlib.sha256(f"{job_id}:{request_index}:{choice}:{call}".encode()).hexdigest()[:24]


def _call(identity: str, name: str, arguments: str) -> Json:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _choice(header: ResponseHeader, choice: ChoiceView, form: AnswerFormat | None, call: CallId) -> Json:
    content: Json = {"text": choice.text}
    if header.chat:
        content = {"message": {"role": "assistant", **choice_parts(form, choice, call), "refusal": None}}
    logprobs = _logprobs(header, choice)
    return {"index": choice.choice_index, **content, "logprobs": logprobs, "finish_reason": finish_reason(form, choice)}


def _logprobs(header: ResponseHeader, choice: ChoiceView) -> Json | None:
    echoed = PromptDetails.read(choice.prompt).echoed
    return logprobs_object(header.endpoint, choice.logprobs, choice.text, echoed)


def _tokens(header: ResponseHeader, choice: ChoiceView) -> Json:
    """Return vLLM's fields of a choice, as requested: its token ids; of a completion, also those of its prompt."""
    prompt = PromptDetails.read(choice.prompt)
    own = {} if prompt.token_ids is None else {"token_ids": choice.token_ids}
    return own if header.chat else own | prompt.fields()


def _prompt_of_chat(header: ResponseHeader, output: OutputView) -> Json:
    return PromptDetails.read(output.choices[0].prompt).fields() if header.chat and output.choices else {}


def usage(view: OutputView) -> Json:
    """Return the token counts of a request; its prompt counts once for all choices."""
    prompt, completion, reasoning = view.prompt_tokens, view.completion_tokens, view.reasoning_tokens
    counts: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    counts |= {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return counts | cached_usage(view)


def cached_usage(view: OutputView) -> Json:
    """Return how many tokens were not computed, because the answer is a copy of an earlier one; nothing if all were.

    OpenAI's `cached_tokens` are those of a prompt whose keys and values were there: another thing.
    """
    return {"cached_answer_tokens": view.cached_tokens} if view.cached_tokens else {}
