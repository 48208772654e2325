"""Parse the input of one request into the request that is stored. Each field is supported, ignored or rejected.

An item is a string, an object with `prompt` or `messages`, or a line of an OpenAI batch file. An invalid item fails its
own request only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import IO, Any

from pydantic import ValidationError
from pydantic_core import from_json

from jobs.errors import (
    BasicError,
    InvalidJsonLine,
    InvalidValue,
    MissingParameter,
    RequestFailed,
    RequestRefused,
    UnsupportedParameter,
)
from jobs.input_format import wide_encoding
from jobs.messages import (
    CHAT_ENDPOINT,
    COMPLETIONS_ENDPOINT,
    RESPONSES_ENDPOINT,
    Endpoint,
    GenerationRequest,
    GrammarSpec,
    SamplingParameters,
)
from jobs.openai.paths import endpoint_of_url
from jobs.submission.custom_ids import GivenId, default_id, recovered
from jobs.submission.fields import PARAMETERS, Field, Treatment, field_of
from jobs.submission.grammar_fields import read_grammar
from jobs.submission.input_lines import Line, Sample, find_custom_id, split_lines
from jobs.submission.models import ModelNames
from jobs.submission.prompts import is_prefill, read_prompt
from jobs.submission.reasoning import chat_options, merged_options
from jobs.submission.responses_api.chat_form import (
    History,
    as_given,
    chat_parameters,
    read_conversation,
    read_options,
)
from jobs.submission.tools import read_tools, tool_options
from jobs.submission.values import boolean, clean_text, kind, refuse_unknown, shown, whole
from storage.dialect import storable
from storage.records import NewRequest, RequestFailure

log = logging.getLogger(__name__)

MAX_CUSTOM_ID_CHARS = 64
MAX_CHAT_LOGPROBS = 20  # alternatives per token, OpenAI's limit
MAX_COMPLETION_LOGPROBS = 5
MAX_CHOICES = 128  # of one request, over all its prompts: they are decoded together
MAX_JSON_NODES = 1_000_000  # lists and objects of one JSON text: 2 bytes each as text, up to 240 in memory
_CHUNK_BYTES = 1 << 20  # of a file, per read
_BYTES_PER_TOKEN = 4  # estimate for ordinary text
_CONTEXT_TOKENS = 4096  # assumed if no worker has reported its own
MAX_TRACED_REQUESTS = 16  # the first requests of a job, which may store draft trees
MAX_TIMEOUT_S = 30 * 86_400
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for raw prompts; chats have no default limit

_NO_NUMBER = re.compile(rb"-?(?:NaN|Infinity)")
_SAMPLING = frozenset(SamplingParameters.model_fields)
_LOGPROBS = frozenset({"logprobs", "top_logprobs"})  # have different meanings on OpenAI's two endpoints
_PROMPT_FIELDS = frozenset({"prompt", "messages", "model", "custom_id", "id", "timeout_s"})
_INPUT_FIELDS = frozenset({"input", "instructions", "previous_response_id", "prompt"})  # of /v1/responses
_LINE_FIELDS = frozenset({"custom_id", "id", "method", "url", "body"})
_MAX_CAP = 2**31 - 1  # of max_tokens; larger ones mean the same: to the context's end


@dataclass(frozen=True, slots=True)
class Item:
    """The input of one request, and its location: a 1-based line of a file, or an index of a list."""

    index: int
    value: Any
    line: int | None = None
    recovered_id: str | None = None  # custom_id found in an unreadable line

    @property
    def location(self) -> str:
        """The location of the item, for error messages."""
        return f"line {self.line}" if self.line is not None else f"requests[{self.index}]"

    @property
    def model(self) -> Any:
        """The item's model, not validated, or None."""
        fields = self.value.get("body", self.value) if isinstance(self.value, dict) else None
        return fields.get("model") if isinstance(fields, dict) else None

    @property
    def is_readable(self) -> bool:
        """True if the value is a string or an object, and so may be a request."""
        return isinstance(self.value, str | dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings and limits that all requests of a job share."""

    job_id: str
    model: str
    endpoint: Endpoint
    defaults: Mapping[str, Any]  # parameters of the job (`parse_parameters`); those of a request override them
    max_prompt_chars: int
    context_tokens: int | None = None  # of the workers that serve the model; None if unknown
    models: ModelNames = field(default_factory=lambda: ModelNames({}))  # the other names of the model
    grammar: GrammarSpec | None = None  # of requests that ask for none of their own
    history: History = field(default_factory=History)


def read_lines(file: IO[bytes], max_line_bytes: int) -> Iterator[Item]:
    """Yield the items of a JSONL file. Skip blank lines; an invalid line becomes an item that will be rejected.

    Raise InvalidJsonLine after the last line if the file has another known format: if no line is readable, or if one
    JSON value fills the file.
    """
    sample = Sample()
    for index, line in enumerate(split_lines(iter(partial(file.read, _CHUNK_BYTES), b""), max_line_bytes)):
        item = _read_line(index, line, max_line_bytes)
        sample.add(line.text, item.is_readable)
        yield item
        del item  # before the next one is read: a line of 10 MB may be 400 MB as a value
    if (found := sample.describe_format()) is not None:
        raise InvalidJsonLine(found)


def read_json(text: bytes) -> Any:
    """Parse strict JSON; raise ValueError also for NaN and lone surrogates.

    First count brackets and braces, also those in strings, because nested lists take 40 times their text in memory.
    """
    if text.count(b"[") + text.count(b"{") > MAX_JSON_NODES:
        raise ValueError(f"more than {MAX_JSON_NODES} lists and objects")
    return from_json(text, allow_inf_nan=False)


def parse_item(item: Item, rules: Rules) -> NewRequest:
    """Return the request of an item. An invalid item becomes a failed request; never raise for its content."""
    try:
        fields = _fields(item.value, rules.endpoint)
        for name in ("custom_id", "id"):
            if name in fields:
                check_custom_id(fields[name], name)
                break
        body = _request(fields, rules, item.index)
        timeout_s = _timeout_s(fields.get("timeout_s"))
        tokens = max_total_tokens(body, rules.context_tokens)
        return NewRequest(_id_of(item), body=body.stored(), tokens=tokens, timeout_s=timeout_s)
    except RequestRefused as refused:
        return refused_request(refused, item)
    except MemoryError:
        raise  # a problem of the machine, not of the request
    except Exception:  # a bug: fail this request and continue with the others
        log.exception("Parsing request %d of job %s failed", item.index, rules.job_id, extra=_log_extra(item, rules))
        return refused_request(RequestFailed("Parsing the request failed."), item)


def _log_extra(item: Item, rules: Rules) -> dict[str, object]:
    return {"action": "unreadable_request", "job_id": rules.job_id, "request_index": item.index}


def refused_request(refused: BasicError, item: Item) -> NewRequest:
    """Return the failed request of an invalid item."""
    where = f"{item.location}, {refused.param}" if refused.param else item.location
    message, param = storable(f"{where}: {refused.message}"), refused.param and storable(refused.param)
    return NewRequest(
        _id_of(item), failure=RequestFailure(refused.code or "invalid_value", message, param, refused.status_code)
    )


def _id_of(item: Item) -> str:
    """Return the item's id, or one generated from its index. The caller ensures that ids are unique."""
    given = given_id(item)
    return default_id(item.index) if given is None else given.text


def parse_body(body: Any, rules: Rules) -> NewRequest:
    """Return the request of a single OpenAI call, from its body; raise RequestRefused if it is invalid."""
    if not isinstance(body, dict):
        raise InvalidValue("The body must be a JSON object.")
    fields = body_fields(body)
    text = _PROMPT_OF[rules.endpoint]
    refuse_unknown(fields, PARAMETERS | {"model", text} | _input_fields(rules.endpoint))
    if rules.endpoint == RESPONSES_ENDPOINT and "prompt" in fields:
        text = "prompt"  # a template, which is refused by name
    for name in ("model", text):
        if name not in fields:
            raise MissingParameter(f"The field {name} is required.", param=name)
    request = _request(fields, rules, 0)
    return NewRequest("request-0", body=request.stored(), tokens=max_total_tokens(request, rules.context_tokens))


def parse_parameters(
    fields: Mapping[str, Any], endpoint: Endpoint, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the sampling parameters and chat options in `fields`; raise RequestRefused for the first invalid one.

    `defaults` are the job's parameters; None: these are.
    """
    asked, names = _asked(parameter_fields(fields, endpoint), endpoint)
    parameters = {name: value for name, value in asked.items() if name in _SAMPLING - _LOGPROBS}
    if asked.keys() & _LOGPROBS:
        parameters["logprobs"] = _logprobs(asked, endpoint, (defaults or {}).get("logprobs"))
    if "max_completion_tokens" in asked:
        parameters["max_tokens"] = asked["max_completion_tokens"]
    if type(cap := parameters.get("max_tokens")) is int:
        parameters["max_tokens"] = min(cap, _MAX_CAP)
    sampling = _sampling({"seed": 0} | parameters, names)
    if defaults is None:  # else those of the job may ask for something
        _refuse_asking_for_nothing(sampling)
    return parameters | chat_options(asked, endpoint) | tool_options(asked, endpoint)


def parameter_fields(fields: Mapping[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """Return the parameters in `fields`, in the words of a chat; raise RequestRefused for unknown ones."""
    given = body_fields(fields)
    refuse_unknown(given, PARAMETERS)
    return chat_parameters(given) if endpoint == RESPONSES_ENDPOINT else given


_PROMPT_OF: Mapping[Endpoint, str] = {
    CHAT_ENDPOINT: "messages",
    COMPLETIONS_ENDPOINT: "prompt",
    RESPONSES_ENDPOINT: "input",
}


def _input_fields(endpoint: Endpoint) -> frozenset[str]:
    return _INPUT_FIELDS if endpoint == RESPONSES_ENDPOINT else frozenset()


def body_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that are not null, with those of its `extra_body` in place."""
    fields = {name: value for name, value in body.items() if value is not None}
    extra = fields.pop("extra_body", None)
    if extra is None:
        return fields
    if not isinstance(extra, dict):
        raise InvalidValue(f"must be an object, not {kind(extra)}", param="extra_body")
    return body_fields(fields | extra)


def _asked(given: Mapping[str, Any], endpoint: Endpoint) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the honoured parameters, and for each the name that was given.

    Raise UnsupportedParameter for the first one that is refused, InvalidValue for two names with different values.
    """
    asked: dict[str, Any] = {}
    names: dict[str, str] = {}
    for given_name, value in given.items():
        row = field_of(given_name, endpoint)
        idle = row.is_idle(value)
        if row.treatment is Treatment.HONOURED and (not idle or row.neutral is not None):
            name, wanted = _meant(row, row.neutral if idle else value)
            other = asked.setdefault(name, wanted)
            if other is not wanted and other != wanted:
                raise InvalidValue(f"contradicts {names[name]}; give one of the two", param=given_name)
            names[name] = given_name
        elif row.treatment is Treatment.REFUSED and not idle and not _returns_all(given_name, value, given):
            raise UnsupportedParameter(f"{row.meaning} Leave the field out.", param=given_name)
    return asked, names


def _meant(row: Field, value: Any) -> tuple[str, Any]:
    """Return the parameter that an honoured field sets, and its value."""
    if row.name != "do_sample":
        return row.same_as or row.name, value
    boolean(value, row.name)  # true is idle
    return "temperature", 0.0


def _returns_all(name: str, value: Any, given: Mapping[str, Any]) -> bool:
    """Return whether the field is best_of and equals n, so that all choices are returned."""
    return name == "best_of" and type(value) is int and value == given.get("n", 1)


def max_total_tokens(request: GenerationRequest, context_tokens: int | None) -> int:
    """Return the maximum number of tokens of a request, prompt and output, estimated before it is tokenized."""
    text = request.prompt or "".join(_texts(request))
    prompts = [prompt if isinstance(prompt, tuple) else prompt.encode() for prompt in request.prompts or (text,)]
    context = context_tokens or _CONTEXT_TOKENS
    total = 0
    for prompt in prompts:
        length = len(prompt) if isinstance(prompt, tuple) else len(prompt) // _BYTES_PER_TOKEN + 1
        room = max(1, context - length)
        cap = room if request.sampling.max_tokens is None else request.sampling.max_tokens
        total += length + request.sampling.n * (cap if context_tokens is None else min(cap, room))
    return total


def _texts(request: GenerationRequest) -> Iterator[str]:
    """Yield the texts that a chat template may show."""
    for message in request.messages or ():
        yield message.content + (message.reasoning_content or "")
        yield from (call.name + call.arguments for call in message.tool_calls)
    if request.tools is not None:
        yield from (json.dumps(function.model_dump()) for function in request.tools.functions)


def _read_line(index: int, line: Line, max_line_bytes: int) -> Item:
    try:
        return Item(index, read_line(line, max_line_bytes), line.number)
    except InvalidJsonLine as refused:
        # A new error: the traceback of this one keeps the line, and many invalid lines may wait together.
        return Item(index, InvalidJsonLine(refused.message), line.number, find_custom_id(line.text))


def read_value(index: int, value: Any) -> Item:
    """Return the item of a value from a message that is not strict JSON as a whole."""
    text = json.dumps(value).encode()
    try:
        return Item(index, read_json(text))
    except ValueError as exc:
        return Item(index, InvalidJsonLine(f"The request is not JSON: {_why(text, exc)}."), None, find_custom_id(text))


def read_line(line: Line, max_bytes: int) -> Any:
    """Return the JSON value of a line; raise InvalidJsonLine, with the reason, if it is invalid or too long."""
    if line.too_long:
        raise InvalidJsonLine(f"The line has more than {max_bytes} bytes.")
    try:
        return read_json(line.text)
    except ValueError as exc:
        raise InvalidJsonLine(f"The line is not JSON: {_why(line.text, exc)}.") from exc


_BOM = "\ufeff".encode()
# What follows a complete value on its line, and why.
_AFTER = {
    _BOM: "a byte order mark inside the line: files were joined without a line break between them",
    b"\x1a": "Ctrl-Z, the end mark of old files, inside the line: files were joined without a line break between them",
    b"{": "two requests on one line; write each on its own line",
    b"[": "two values on one line; write each on its own line",
    b",": "a comma after the request; remove the commas between lines",
}


def _why(text: bytes, exc: ValueError) -> str:
    """Return why a line is not JSON, replacing messages of the parser that don't help."""
    reason, _, column = str(exc).partition(" at line 1 column ")  # the parser's line is always 1
    rest = text[int(column or 1) - 1 :]
    after = next((why for mark, why in _AFTER.items() if rest.startswith(mark)), None)
    if (encoding := wide_encoding(text)) is not None:
        return f"it is {encoding}; save the whole file as UTF-8"
    if text.endswith(b","):
        reason, column = "it ends with a comma", ""
    elif reason == "expected value" and (number := _NO_NUMBER.match(rest)):
        reason = f"{number[0].decode()} is not a JSON number"
    elif reason == "trailing characters" and after is not None:
        reason = after
    elif reason == "invalid unicode code point":
        reason = "it is not UTF-8"
    elif "surrogate" in reason or reason == "unexpected end of hex escape":
        reason = "half of a surrogate pair is not valid text"
    return f"{reason} (column {column})" if column else reason


def given_id(item: Item) -> GivenId | None:
    """Return the custom_id of an item, which may be invalid otherwise; None if there is none."""
    if item.recovered_id is not None:
        return recovered(item.recovered_id)
    line = item.value if isinstance(item.value, dict) else {}
    body = line.get("body")
    for name in ("custom_id", "id"):
        for fields in (line, body if isinstance(body, dict) else {}):
            if fields.get(name) is not None:
                return _given_id(fields[name], name)
    return None


def _given_id(custom_id: Any, name: str) -> GivenId | None:
    try:
        return GivenId(check_custom_id(custom_id, name), is_own=True)
    except InvalidValue:
        return recovered(custom_id)


def check_custom_id(custom_id: Any, name: str = "custom_id") -> str:
    """Return a valid custom_id; raise InvalidValue otherwise."""
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidValue(f"must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters.", param=name)
    return clean_text(custom_id, name)


def _fields(value: Any, endpoint: str) -> dict[str, Any]:
    """Return the fields of an item, in any of its forms, as one flat dict."""
    if isinstance(value, RequestRefused):
        raise value
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidValue(f"A request is a string or an object, not {kind(value)}.")
    fields = {name: inner for name, inner in value.items() if inner is not None}
    return _line_fields(fields, endpoint) if fields.keys() & {"body", "method", "url"} else body_fields(fields)


def _line_fields(line: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """Return the fields of an OpenAI batch line: its body and its custom_id."""
    refuse_unknown({name: value for name, value in line.items() if value not in ({}, [])}, _LINE_FIELDS)
    if not is_post(line.get("method", "POST")):
        raise InvalidValue("The method must be POST.", param="method")
    if not is_url_of(line.get("url", endpoint), endpoint):
        raise InvalidValue(f"The url must be the job's endpoint, {endpoint}.", param="url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise MissingParameter("The body must be an object with the request's parameters.", param="body")
    names = {name: line[name] for name in ("custom_id", "id") if name in line}
    return body_fields(body) | names


def is_post(method: Any) -> bool:
    """Return whether a line's method is POST, in any case."""
    return isinstance(method, str) and method.upper() == "POST"


def is_url_of(url: Any, endpoint: str) -> bool:
    """Return whether a line's url is the endpoint, in one of its spellings."""
    return endpoint_of_url(url) == endpoint


def _timeout_s(value: Any) -> float | None:
    """Return the timeout of a request in seconds, counted from the creation of its job."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TIMEOUT_S:
        raise InvalidValue(f"must be a number of seconds above 0 and at most {MAX_TIMEOUT_S}", param="timeout_s")
    return float(value)


def _request(fields: Mapping[str, Any], rules: Rules, index: int) -> GenerationRequest:
    refuse_unknown(fields, _PROMPT_FIELDS | PARAMETERS | _input_fields(rules.endpoint))
    if fields.get("model", rules.model) != rules.model != rules.models.find(fields["model"]):
        raise InvalidValue(
            f"This job uses the model {rules.model!r}. Submit requests for other models as another job.", param="model"
        )
    if rules.endpoint != RESPONSES_ENDPOINT:
        return _chat_request(fields, rules, index)
    conversation = read_conversation(fields, rules.history)
    with as_given(fields, rules.endpoint, conversation.places):
        given = parameter_fields(_parameters_in(fields), rules.endpoint)
        request = _chat_request({**given, "messages": conversation.messages}, rules, index)
    return request.model_copy(update={"response": read_options(fields)})


def _parameters_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in PARAMETERS}


def _chat_request(fields: Mapping[str, Any], rules: Rules, index: int) -> GenerationRequest:
    """Return the request of a body with `messages` or `prompt`."""
    given = body_fields(_parameters_in(fields))
    parameters = parse_parameters(given, rules.endpoint, rules.defaults)
    grammar = read_grammar(given, rules.endpoint, rules.grammar)
    prompt = read_prompt(fields, rules.endpoint, rules.max_prompt_chars)
    if is_prefill(fields):
        parameters["continue_final_message"] = True
    sampling = _sampling_for(parameters, rules, index)
    _refuse_contradictions(sampling, {**rules.defaults, **parameters}, prompt)
    _refuse_many(len(prompt.get("prompts", ())), sampling.n)
    options = merged_options(rules.defaults, parameters)
    tools = read_tools({**rules.defaults, **parameters}, rules.max_prompt_chars)
    return GenerationRequest(model=rules.model, sampling=sampling, tools=tools, grammar=grammar, **prompt, **options)


def _sampling_for(parameters: Mapping[str, Any], rules: Rules, index: int) -> SamplingParameters:
    base: dict[str, Any] = {"seed": _seed(rules.job_id, index)}
    if rules.endpoint == COMPLETIONS_ENDPOINT:
        base["max_tokens"] = COMPLETIONS_MAX_TOKENS
    given = {**rules.defaults, **parameters}
    sampling = _sampling(base | {name: value for name, value in given.items() if name in _SAMPLING})
    return sampling if index < MAX_TRACED_REQUESTS else sampling.model_copy(update={"record_trees": 0})


def _refuse_contradictions(sampling: SamplingParameters, given: Mapping[str, Any], prompt: Mapping[str, Any]) -> None:
    """Refuse parameters that are valid alone and not together, or not with this prompt."""
    if sampling.continue_final_message and given.get("add_generation_prompt"):
        raise InvalidValue(
            "contradicts add_generation_prompt: the answer continues the last message, or begins a new one.",
            param="continue_final_message",
        )
    if sampling.continue_final_message and "messages" not in prompt:
        raise InvalidValue("needs messages; /v1/completions continues a prompt.", param="continue_final_message")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidValue(
            f"must be at most max_tokens, which is {sampling.max_tokens}, not {sampling.min_tokens}", param="min_tokens"
        )
    _refuse_asking_for_nothing(sampling)


def _refuse_asking_for_nothing(sampling: SamplingParameters) -> None:
    if sampling.max_tokens == 0 and not sampling.echo and sampling.prompt_logprobs is None:
        raise InvalidValue(
            "must be greater than or equal to 1, not 0; 0 is for requests with echo or prompt_logprobs",
            param="max_tokens",
        )


def _sampling(parameters: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> SamplingParameters:
    """Return the validated parameters; `names` are those that they were given by, if others."""
    try:
        return SamplingParameters.model_validate(parameters, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        message = first["msg"].replace("Input should", "must")
        # Messages of our own validators are complete; those of pydantic lack the value.
        given = "" if first["type"] == "value_error" else f", not {shown(first['input'])}"
        name = str(first["loc"][0])
        raise InvalidValue(f"{message}{given}", param=names.get(name, name)) from exc


def _logprobs(fields: Mapping[str, Any], endpoint: Endpoint, default: int | None) -> int | None:
    """Return the number of top tokens to return per token; None if no log-probabilities are requested."""
    logprobs, top = fields.get("logprobs"), fields.get("top_logprobs")
    if endpoint == COMPLETIONS_ENDPOINT:
        if top:
            raise InvalidValue(f"is for chats; on {endpoint}, set logprobs to the number", param="top_logprobs")
        # Not `in (None, False)`: 0 == False in Python, but 0 requests the sampled tokens' log-probabilities.
        wanted = logprobs is not None and logprobs is not False
        return whole(logprobs, "logprobs", MAX_COMPLETION_LOGPROBS) if wanted else None
    if not isinstance(logprobs, bool | None):
        raise InvalidValue(
            f"must be true or false, not {shown(logprobs)}; set top_logprobs to the number", param="logprobs"
        )
    top_k = None if top is None else whole(top, "top_logprobs", MAX_CHAT_LOGPROBS)
    if not (default is not None if logprobs is None else logprobs):
        if top_k:
            raise InvalidValue("needs logprobs to be true", param="top_logprobs")
        return None
    return top_k if top_k is not None else default or 0


def _seed(job_id: str, index: int) -> int:
    """Return the default seed of a request. It is stored, so that running the request again gives the same tokens."""
    digest = hashlib.sha256(f"{job_id}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit a signed 64-bit integer


def _refuse_many(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise InvalidValue(
            f"{prompts} prompts with {n} choices each are more than {MAX_CHOICES} texts.", param="prompt"
        )
