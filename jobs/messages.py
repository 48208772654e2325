"""Immutable messages between processes: prompt batches, requests, sampling parameters, partial events, statuses.

Each message carries a version `v`, so that an old worker recognises a message that it can't read.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from storage.priorities import Priority as Priority  # part of this module's interface
from storage.statuses import JobStatus as JobStatus
from storage.statuses import RequestStatus as RequestStatus

MESSAGE_VERSION: Final = 1
CHAT_ENDPOINT: Final = "/v1/chat/completions"
COMPLETIONS_ENDPOINT: Final = "/v1/completions"
RESPONSES_ENDPOINT: Final = "/v1/responses"
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]


class Frozen(BaseModel):
    """Immutable model that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _unset(default: Any, description: str | None = None, **limits: Any) -> Any:
    """Return a field that is left out of the JSON while it has its default: older versions reject unknown fields."""
    return Field(default, description=description, exclude_if=lambda value: value == default, **limits)


class ToolCall(Frozen):
    """A call of a function in an assistant message."""

    id: str
    name: str
    arguments: str  # a JSON object, as text


class ChatMessage(Frozen):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    # Of an answer in the history, for templates that read it.
    reasoning_content: str | None = _unset(None)
    tool_calls: tuple[ToolCall, ...] = _unset(())  # of an assistant
    tool_call_id: str | None = _unset(None)  # of a tool message: the call that it answers, and its function
    name: str | None = _unset(None)


ToolChoice = Literal["auto", "none", "required", "named"]


class FunctionTool(Frozen):
    """A function that the model may call."""

    name: str
    description: str | None = _unset(None)
    parameters: dict[str, Any] | None = _unset(None)  # JSON schema of its arguments; None: it has none
    strict: bool = _unset(False)
    bound: bool = _unset(True)  # False: the schema can't be held, and arguments are bound to an object only

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The schema that binds the arguments of calls: of an object in any case."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {**self.parameters, "type": "object"} if self.bound else {"type": "object"}


class Tools(Frozen):
    """The functions of a request, and which of them the model may or must call."""

    functions: tuple[FunctionTool, ...]
    choice: ToolChoice = "auto"
    names: tuple[str, ...] | None = _unset(None)  # of the functions that it may call; None: all
    parallel: bool = _unset(True)  # it may call several at once

    @property
    def forced(self) -> bool:
        """True if the answer is a call."""
        return self.choice in ("required", "named")

    @property
    def callable(self) -> tuple[FunctionTool, ...]:
        """The functions that the model may call."""
        if self.choice == "none":
            return ()
        return tuple(one for one in self.functions if self.names is None or one.name in self.names)


TOOLS_TEMPERATURE: Final = 0.0  # default of `basic submit`, `basic generate` and the dashboard; the API's is OpenAI's 1

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 1000
MAX_STOP_TOKEN_IDS: Final = 64
MAX_BIASES: Final = 1024
MAX_COMPARED_REQUESTS: Final = 100  # limit of `compare_plain`
MAX_PROMPT_LOGPROBS: Final = 20  # top tokens per prompt token


def _stop_strings(value: Any) -> Any:
    """Accept a single string as a list of one; reject invalid stop strings."""
    stops = [value] if isinstance(value, str) else value
    wanted = f"must be a string or a list of at most {MAX_STOP_STRINGS} strings"
    if not isinstance(stops, list | tuple) or len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("value_error", wanted)
    if not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARS and "\0" not in stop for stop in stops):
        raise PydanticCustomError("value_error", f"{wanted}, each of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _biases(value: Any) -> Any:
    """Convert the token ids of a JSON object from strings of digits to integers."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "value_error", f"must be an object of at most {MAX_BIASES} token ids and their biases"
        )
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,9}", str(token)) for token in value):
        raise PydanticCustomError("value_error", "must be an object whose keys are token ids")
    return {int(token): bias for token, bias in value.items()}


def _few_ids(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("value_error", f"must be a list of at most {MAX_STOP_TOKEN_IDS} token ids")
    return tuple(value)


def _kept_tokens(value: int | None) -> int | None:
    if value == 0:
        raise PydanticCustomError("value_error", "must be -1 or at least 1, not 0")
    return value


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingParameters(Frozen):
    """Sampling parameters of one request, how its prompt is read, and what its answer holds. Defaults are OpenAI's."""

    max_tokens: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Cap per choice; none: to the context's end. 0 needs echo or prompt_logprobs.",
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 decodes greedily.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Keep tokens at least this likely, relative to the likeliest.")
    n: int = Field(1, ge=1, le=128, description="Choices per request.")
    seed: int = Field(
        ge=-(2**63),
        le=2**63 - 1,
        description="Same seed and request, same text. Without one, each request gets another; `identity`: one that "
        "follows from the rest of the request.",
    )
    ignore_eos: bool = Field(False, description="Continue past the end-of-sequence token.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted from tokens that the output holds.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted once for each time it holds them.")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Divides logits of tokens in prompt and output.")
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_biases)] = Field(
        default_factory=dict, description="Added to the logits of these token ids."
    )
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = Field(
        (), description="The text ends before the first of these."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Number of top tokens to return per token; none: no log-probabilities."
    )
    record_trees: int = Field(
        0, ge=0, le=64, description="Steps whose draft trees are stored for inspection; only of a job's first requests."
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_few_ids)] = Field(
        (), description="Additional end-of-sequence tokens; they apply with ignore_eos too."
    )
    min_tokens: int = _unset(
        0,
        "No end-of-sequence token is drawn, and no stop string is found, before this many tokens.",
        ge=0,
        le=2**31 - 1,
    )
    include_stop_str_in_output: bool = _unset(
        False, "The text keeps the stop string, or the text of the stop token, that ends it."
    )
    skip_special_tokens: bool = _unset(True, "False: the text holds special tokens too.")
    add_generation_prompt: bool = _unset(True, "False: the chat template does not begin an answer.")
    continue_final_message: bool = _unset(
        False, "The answer continues the last message; then add_generation_prompt is false."
    )
    add_special_tokens: bool | None = _unset(
        None,
        "Whether the tokenizer adds its special tokens, such as BOS, to the prompt; none: to a raw prompt, not to a "
        "chat, whose template writes them.",
    )
    truncate_prompt_tokens: Annotated[int | None, AfterValidator(_kept_tokens)] = _unset(
        None,
        "Keep this many tokens of a longer prompt; -1: as many as max_tokens leaves of the context.",
        ge=-1,
        le=2**31 - 1,
    )
    truncation_side: Literal["left", "right"] = _unset(
        "left", "left keeps the last tokens of a truncated prompt, right the first."
    )
    echo: bool = _unset(
        False, "The text begins with the prompt, of a chat with the assistant's message that it continues."
    )
    prompt_logprobs: int | None = _unset(
        None,
        "Number of top tokens to return per prompt token, with its log-probability; none: neither.",
        ge=0,
        le=MAX_PROMPT_LOGPROBS,
    )
    return_token_ids: bool = _unset(False, "Return the token ids of prompt and answer.")
    return_tokens_as_token_ids: bool = _unset(False, "Log-probabilities name tokens as token_id:N.")


# That the model's generation config may give; left out of stored requests that do not set them.
DEFAULTED_SAMPLING: Final = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"})


def _without_nul(text: str) -> str:
    """Reject U+0000, which PostgreSQL can't store."""
    if "\0" in text:
        raise PydanticCustomError("value_error", "The character U+0000 is not allowed.")
    return text


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]


class GrammarSpec(Frozen):
    """What the text of a choice must be, as its caller asked for it; `jobs.grammar` turns it into a grammar.

    `value` is the schema or the choices as JSON text, so that their order is kept; the expression; or the grammar, in
    Lark or EBNF. Of `json_object` it is empty. The parts of JSON may have white space between them that matches
    `whitespace`: none if it is empty, a short default if it is None.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: str = ""
    whitespace: str | None = _unset(None)


class ReasoningOptions(Frozen):
    """What a request asks of the reasoning. What it leaves open is up to the model's chat template."""

    enabled: bool | None = _unset(None)
    effort: str | None = _unset(None)
    included: bool = _unset(True)  # False: the answer leaves it out
    separate: bool = _unset(True)  # False: the content is the whole text


class ResponseOptions(Frozen):
    """Fields of a /v1/responses body that its Response object repeats, beside those that are in the stored request.

    `echo` has fields with their names and values as given, such as `text`, `tools` and `user`.
    """

    instructions: bool = _unset(False)  # the first message is the instructions, which no later response inherits
    previous_response_id: str | None = _unset(None)
    background: bool = _unset(False)
    store: bool = _unset(True)
    echo: dict[str, Any] = _unset({})


class GenerationRequest(Frozen):
    """A request as stored in `requests.body`: everything a worker needs to generate its text.

    It has `messages`, `prompt` or `prompts`. On the chat endpoint a prompt is one user message. Each of several prompts
    has `sampling.n` choices, in the order of the prompts.
    """

    v: Literal[1] = MESSAGE_VERSION
    model: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    prompt: Text | None = None
    prompts: Annotated[tuple[Text | TokenIds, ...], Field(min_length=1)] | None = None  # on /v1/completions
    sampling: SamplingParameters
    grammar: GrammarSpec | None = _unset(None)
    chat_template_kwargs: dict[str, Any] | None = _unset(None)
    reasoning: ReasoningOptions | None = _unset(None)
    tools: Tools | None = _unset(None)  # of a chat
    response: ResponseOptions | None = _unset(None)  # on /v1/responses
    keep: dict[str, Any] | None = _unset(None)  # of the caller, returned with the output

    @property
    def bound(self) -> bool:
        """True if each answer must match a grammar: the caller's, or that of a forced call."""
        return self.grammar is not None or (self.tools is not None and self.tools.forced)

    def stored(self) -> dict[str, Any]:
        """Return the JSON of `requests.body`, without the sampling parameters that the worker may fill in."""
        unset = DEFAULTED_SAMPLING - self.sampling.model_fields_set
        return self.model_dump(mode="json", exclude={"sampling": set(unset)})


class PromptBatch(Frozen):
    """A job that a producer inside the cluster pushes onto Redis: prompts and their common parameters.

    The producer chooses `id`; pushing the same id again has no effect. `requests` has the same items as the lines of
    `POST /v1/jobs`: a string, or an object with `prompt` or `messages`, an optional `custom_id`, and parameters that
    override `parameters`.
    """

    # Serialize NaN as NaN, so that its request fails. As null it would silently mean the default.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    v: Literal[1] = MESSAGE_VERSION
    id: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_without_nul)]
    model: Annotated[str, AfterValidator(_without_nul)] | None = None
    endpoint: Endpoint = CHAT_ENDPOINT
    requests: Annotated[tuple[Any, ...], Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None
    # Omitted if unset, because processes of an older version reject unknown fields.
    name: str | None = _unset(None)
    labels: dict[str, str] | None = _unset(None)
    priority: Priority | None = _unset(None)
    max_concurrent: int | None = _unset(None, strict=True)
    budget: dict[str, Any] | None = _unset(None)  # tokens, seconds
    compare_plain: int | None = Field(
        None, ge=1, le=MAX_COMPARED_REQUESTS, strict=True, exclude_if=lambda count: count is None
    )


class ReasoningFormat(Frozen):
    """How the text of a request marks its reasoning: the model's own markers, as its chat template has them."""

    model_config = ConfigDict(extra="ignore")  # newer workers write more

    start: str
    end: str
    opened: bool = False  # the prompt ends with `start`: the text begins inside the reasoning
    included: bool = True  # False: answers leave the reasoning out (`include_reasoning`)
    separate: bool = True  # False: the content is the whole text (`separate_reasoning`)

    @property
    def shown(self) -> bool:
        """True if answers have a part for the reasoning."""
        return self.separate and self.included


class CallAnswer(Frozen):
    """How the text of a request writes its calls."""

    form: str  # the name of a format of jobs.openai.call_formats
    named: bool = _unset(False)  # the request named the function


class AnswerFormat(Frozen):
    """How the raw text of a request splits into the parts of an answer (jobs.openai.answers).

    The worker derives it from the model's chat template and the request, and stores it in `requests.answer_format` no
    later than the first tokens. Null there: the text is the content.
    """

    model_config = ConfigDict(extra="ignore")  # newer workers write more

    reasoning: ReasoningFormat | None = _unset(None)
    calls: CallAnswer | None = _unset(None)


class Piece(Frozen):
    """A span of text from one source: accepted draft tokens, or tokens that the target sampled itself."""

    text: str
    source: Literal["draft", "target"]


class PartialEvent(Frozen):
    """One event of one choice, published on `basic:partials:{job_id}` after its rows are committed.

    `seq` counts from 0 per (request, choice), so that a reader detects gaps. `tokens` is the number of tokens in this
    event, `accepted` how many of them were accepted draft tokens. A `finished` event has `finish_reason`, a `failed`
    event has `error`. An event of type `job` has the job's `status` and no request.

    A `tokens` event with `snapshot` is read from SQL, not published: it has all text of the choice up to `seq` and
    replaces the reader's text. Only events with a choice's text from its start have the `answer_format`, if there is
    one.
    """

    model_config = ConfigDict(extra="ignore")  # newer servers send more

    v: Literal[1] = MESSAGE_VERSION
    job_id: str
    request: str | None = None
    index: int | None = None
    choice: int = 0
    seq: int = 0
    type: Literal["started", "tokens", "finished", "failed", "job"]
    text: str = ""
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    accepted: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    status: JobStatus | None = None
    snapshot: bool = False
    answer_format: AnswerFormat | None = None


def model_name(target: str) -> str:
    """Return the public name of a target model: a hub id as it is, or the last part of a path."""
    return PurePath(target).name if target.startswith(("/", ".", "~")) else target


def model_queue(model: str) -> str:
    """Return the Celery queue for notifications of a model; a node consumes the queues of its own models."""
    return "basic.model." + re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
