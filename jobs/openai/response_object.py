"""Build the Response objects of the Responses API from database rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.messages import FunctionTool, GenerationRequest, ResponseOptions, Tools
from jobs.openai.answer_words import answer_parts
from jobs.openai.completions import answer_format, cached_usage
from jobs.openai.response_items import (
    ItemStatus,
    call_id_of,
    call_item,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    text_logprobs,
    text_part,
)
from storage.queries import OutputView

Json = dict[str, Any]

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
        # As in chats: OpenAI's type has no such field, but allows more. `metadata` holds the caller's own pairs.
        "system_fingerprint": None if choice is None else choice.numerics,
        **_repeated(stored, {} if output is None else output.sampling_defaults or {}),
    }


_STATUSES: Final = {"running": "in_progress", "expired": "failed"}


def output_items(response_id: str, output: OutputView) -> Iterator[Json]:
    """Yield the items of an answer: reasoning, text and calls, in order. Only the last may be incomplete."""
    (choice,) = output.choices
    parts = answer_parts(answer_format(output), choice.text)
    logprobs = text_logprobs(choice.logprobs)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        status: ItemStatus = "incomplete" if last and choice.finish_reason == "length" else "completed"
        if part.is_reasoning:
            yield reasoning_item(item_id("rs", response_id, index), status, [reasoning_part(part.text)])
        elif part.call is not None:
            call = call_id_of(response_id, part.call)
            yield call_item(item_id("fc", response_id, index), status, call, part.name, part.text)
        else:
            yield message_item(item_id("msg", response_id, index), status, [text_part(part.text, logprobs)])


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
        "parallel_tool_calls": stored.request.tools is None or stored.request.tools.parallel,
        "previous_response_id": options.previous_response_id,
        "prompt_cache_key": echo.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None} | echo.get("reasoning", {}),
        "safety_identifier": echo.get("safety_identifier"),
        "service_tier": "default",
        "store": options.store,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}} | {name: value for name, value in echo.get("text", {}).items() if value},
        "tool_choice": "auto" if stored.request.tools is None else _tool_choice(stored.request.tools),
        "tools": [] if stored.request.tools is None else list(map(_tool, stored.request.tools.functions)),
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled" if sampling.truncate_prompt_tokens is None else "auto",
        "user": echo.get("user"),
    }


def _tool(function: FunctionTool) -> Json:
    return {
        "type": "function",
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
        "strict": function.strict,
    }


def _tool_choice(tools: Tools) -> str | Json:
    names = [{"type": "function", "name": name} for name in tools.names or ()]
    if tools.choice == "named":
        return names[0]
    return tools.choice if tools.names is None else {"type": "allowed_tools", "mode": tools.choice, "tools": names}


def response_error(status_code: int, message: str) -> Json:
    """Return the error of a failed response; OpenAI's types know few codes."""
    code = "server_error" if status_code >= 500 or status_code == 408 else "invalid_prompt"
    return {"code": code, "message": message}


def _error(output: OutputView | None) -> Json:
    message = output.error_message if output is not None else None
    status_code = output.error_status_code if output is not None else None
    return response_error(status_code or 500, message or "The request has no result.")


def _usage(output: OutputView) -> Json:
    """Return the token counts. `cached_tokens` are of prompts whose KV was there: not counted, always 0."""
    prompt, completion = output.prompt_tokens, output.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": output.reasoning_tokens or 0},
        "total_tokens": prompt + completion,
        **cached_usage(output),
    }
