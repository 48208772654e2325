"""Build the Response objects of the Responses API from database rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.messages import GenerationRequest, ResponseOptions
from jobs.openai.answers import split_answer
from jobs.openai.completions import answer_format
from jobs.openai.response_items import (
    ItemStatus,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    text_logprobs,
    text_part,
)
from storage.queries import OutputView

Json = dict[str, Any]

_PREFIX: Final = "resp_"
_OF_A_JOB: Final = re.compile(r"resp_(?P<job_id>.+)_(?P<index>\d{1,9})", re.DOTALL)
_DEFAULTS: Final = ResponseOptions()


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A request of /v1/responses, as stored."""

    id: str
    model: str
    created_at: float
    request: GenerationRequest

    @property
    def options(self) -> ResponseOptions:
        """The fields that the Response object repeats."""
        return self.request.response or _DEFAULTS


def response_id(job_id: str, request_index: int) -> str:
    """Return the id of the response of a request. A job that is a single response has its id."""
    return job_id if job_id.startswith(_PREFIX) else f"{_PREFIX}{job_id}_{request_index}"


def request_of(response_id: str) -> tuple[str, int]:
    """Return job id and request index of a response."""
    found = _OF_A_JOB.fullmatch(response_id)
    return (response_id, 0) if found is None else (found["job_id"], int(found["index"]))


def response_object(
    stored: StoredResponse, status: str, output: OutputView | None = None, finished_at: float | None = None
) -> Json:
    """Return a Response: with its output if it has completed, with its error if it has failed.

    `status` is that of the request. A text that reached its cap is an incomplete response.
    """
    choice = output.choices[0] if output is not None and output.choices else None
    cut = status == "completed" and choice is not None and choice.finish_reason == "length"
    ended_at = choice.finished_at if choice is not None else finished_at
    return {
        "id": stored.id,
        "object": "response",
        "created_at": int(stored.created_at),
        "completed_at": None if ended_at is None or status != "completed" else int(ended_at),
        "status": "incomplete" if cut else _STATUSES.get(status, status),
        "error": _error(output) if status in ("failed", "expired") else None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": stored.model,
        "output": [] if output is None or choice is None else list(output_items(stored.id, output)),
        "usage": None if output is None or choice is None else _usage(output),
        **_repeated(stored, {} if output is None else output.sampling_defaults or {}),
    }


_STATUSES: Final = {"running": "in_progress", "expired": "failed"}


def output_items(response_id: str, output: OutputView) -> Iterator[Json]:
    """Yield the items of an answer: its reasoning, if it has one, and its text. Only the last may be incomplete."""
    (choice,) = output.choices
    answer = split_answer(answer_format(output), choice.text)
    last: ItemStatus = "incomplete" if choice.finish_reason == "length" else "completed"
    if answer.reasoning is not None:
        status = last if answer.content is None else "completed"
        yield reasoning_item(item_id("rs", response_id, 0), status, [reasoning_part(answer.reasoning)])
    if answer.content is not None:
        part = text_part(answer.content, text_logprobs(choice.logprobs))
        yield message_item(item_id("msg", response_id, int(answer.reasoning is not None)), last, [part])


def _repeated(stored: StoredResponse, defaults: Mapping[str, Any]) -> Json:
    """Return what the request asked for. `defaults` are the sampling parameters that the model's own config gave."""
    options, given = stored.options, stored.request.sampling
    sampling = given.model_copy(update={name: v for name, v in defaults.items() if name not in given.model_fields_set})
    echo = options.echo
    instructions = stored.request.messages[0].content if options.instructions and stored.request.messages else None
    return {
        "background": options.background,
        "instructions": instructions,
        "max_output_tokens": sampling.max_tokens,
        "metadata": echo.get("metadata", {}),
        "parallel_tool_calls": echo.get("parallel_tool_calls", True),
        "previous_response_id": options.previous_response_id,
        "prompt_cache_key": echo.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None} | echo.get("reasoning", {}),
        "safety_identifier": echo.get("safety_identifier"),
        "service_tier": "default",
        "store": options.store,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}} | {name: value for name, value in echo.get("text", {}).items() if value},
        "tool_choice": echo.get("tool_choice", "auto"),
        "tools": echo.get("tools", []),
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": echo.get("user"),
    }


def _error(output: OutputView | None) -> Json:
    """Return the error of a failed response; OpenAI's types know few codes."""
    message = output.error_message if output is not None else None
    status_code = (output.error_status_code if output is not None else None) or 500
    return {
        "code": "server_error" if status_code >= 500 or status_code == 408 else "invalid_prompt",
        "message": message or "The request has no result.",
    }


def _usage(output: OutputView) -> Json:
    """Return the token counts. Cached tokens are not counted: always 0."""
    prompt, completion = output.prompt_tokens, output.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": output.reasoning_tokens or 0},
        "total_tokens": prompt + completion,
    }
