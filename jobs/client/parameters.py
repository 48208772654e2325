"""The sampling parameters of a submission, typed for editors and type checkers. The service validates the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from jobs.client.response_format import ResponseFormat
from jobs.messages import Priority


class JobChanges(TypedDict, total=False):
    """What can be changed of a job; None removes it. Labels that are not named stay."""

    name: str | None
    labels: Mapping[str, str | None] | None
    priority: Priority | Literal["high", "normal", "low"]
    max_concurrent: int | None
    budget: Mapping[str, float | None] | None  # tokens, seconds; one that is not named stays


class Parameters(TypedDict, total=False):
    """Sampling parameters for all requests of a job that do not set their own. None is the same as not given."""

    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    n: int | None
    seed: int | Literal["identity"] | None
    cache: bool | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    logprobs: bool | int | None
    top_logprobs: int | None
    record_trees: int | None
    response_format: ResponseFormat | None  # a class, a JSON schema, or OpenAI's object
    structured_outputs: Mapping[str, Any] | None
    guided_json: Mapping[str, Any] | str | None
    guided_json_object: bool | None
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    ebnf: str | None
    grammar: Mapping[str, Any] | str | None
    chat_template_kwargs: Mapping[str, Any] | None
    enable_thinking: bool | None
    reasoning_effort: str | None
    thinking: bool | Mapping[str, Any] | None
    reasoning: Mapping[str, Any] | None
    include_reasoning: bool | None
    separate_reasoning: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    min_tokens: int | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    truncation_side: Literal["left", "right"] | None
    echo: bool | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    return_tokens_as_token_ids: bool | None
