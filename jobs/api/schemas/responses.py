"""Response models of /v1/responses, in the shapes of OpenAI's Responses API.

`jobs.openai.response_object` and `jobs.openai.response_events` build the bodies; a test checks that both agree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from jobs.openai.response_items import ItemStatus

Json = dict[str, Any]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class _ResponsePart(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TopToken(_ResponsePart):
    """An alternative at the position of a token."""

    token: str
    bytes: list[int]
    logprob: float


class TextToken(TopToken):
    """A token of an output text, with its log-probability and the likeliest tokens at its position."""

    top_logprobs: list[TopToken]


class OutputText(_ResponsePart):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Json]
    logprobs: list[TextToken]


class InputText(_ResponsePart):
    """The text of a message of the input."""

    type: Literal["input_text"]
    text: str


class ReasoningText(_ResponsePart):
    """The text of a reasoning item."""

    type: Literal["reasoning_text"]
    text: str


class MessageItem(_ResponsePart):
    """What the model answered."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningItem(_ResponsePart):
    """The reasoning before an answer. It has no summary."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Json]
    content: list[ReasoningText]


class CallItem(_ResponsePart):
    """A call of a function, which the caller runs."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[MessageItem | ReasoningItem | CallItem, Field(discriminator="type")]


class InputMessageItem(_ResponsePart):
    """A message of the input."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["user", "system"]
    content: list[InputText]


class CallOutputItem(_ResponsePart):
    """The result of a call."""

    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str | None
    output: str


class InputItemPage(_ResponsePart):
    """A page of the conversation that a response has read."""

    object: Literal["list"]
    data: list[InputMessageItem | MessageItem | CallItem | CallOutputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseError(_ResponsePart):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(_ResponsePart):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseInputDetails(_ResponsePart):
    """Details of the input tokens. Cached tokens are not counted: always 0."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseOutputDetails(_ResponsePart):
    """Details of the output tokens."""

    reasoning_tokens: int


class ResponseUsage(_ResponsePart):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


class ResponseReply(_ResponsePart):
    """A response. Times are Unix seconds."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    system_fingerprint: str | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Json
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class _Event(_ResponsePart):
    sequence_number: int


class StatusEvent(_Event):
    """The response has a new status."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseReply


class ItemEvent(_Event):
    """An item begins or is done."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _ContentEvent(_Event):
    item_id: str
    output_index: int
    content_index: int


class PartEvent(_ContentEvent):
    """The content of an item begins or is done."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class TextDelta(_ContentEvent):
    """New text of the answer."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TextToken]


class TextDone(_ContentEvent):
    """The whole text of the answer."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TextToken]


class ReasoningDelta(_ContentEvent):
    """New text of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDone(_ContentEvent):
    """The whole text of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDelta(_Event):
    """New text of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(_Event):
    """The arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


_AnyEvent = Annotated[
    StatusEvent
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone,
    Field(discriminator="type"),
]


class ResponseEvent(RootModel[_AnyEvent]):
    """An event of a streamed response."""
