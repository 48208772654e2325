"""From what someone wrote for one request to the request that is stored: every field honoured, refused or documented.

An item is a string, an object with `prompt` or `messages`, or a line of an OpenAI batch file. Pure: knows no SQL, no
Redis and no HTTP. Whatever is wrong with an item fails its own request and no other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import IO, Any, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import from_json

from jobs.errors import (
    BasicError,
    InvalidJsonLine,
    InvalidValue,
    MissingParameter,
    PromptTooLong,
    RequestFailed,
    RequestRefused,
    UnknownParameter,
    UnsupportedParameter,
)
from jobs.messages import COMPLETIONS_ENDPOINT, ChatMessage, Endpoint, GenerationRequest, SamplingParameters
from jobs.submission.custom_ids import GivenId, default_id, recovered, storable
from jobs.submission.input_lines import Line, Sample, describe_format, find_custom_id, split_lines
from storage.records import NewRequest, RequestFailure

log = logging.getLogger(__name__)

MAX_CUSTOM_ID_CHARS = 64
MAX_CHAT_LOGPROBS = 20  # alternatives of one token, as OpenAI has it
MAX_COMPLETION_LOGPROBS = 5
MAX_CHOICES = 128  # of one request, over all its prompts: they are decoded together
MAX_JSON_NODES = 1_000_000  # lists and objects of one JSON text: each takes up to 240 bytes, and two to write
_PIECE_BYTES = 1 << 20  # of a file that are read at once
_BYTES_PER_TOKEN = 4  # of ordinary text
_CONTEXT_TOKENS = 4096  # where no worker has recovered its own
MAX_TRACED_REQUESTS = 16  # of a job: so many at most keep draft trees, its first ones
MAX_TIMEOUT_S = 30 * 86_400
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for raw prompts; a chat answer runs to the context's end

# Fields of the OpenAI API that are accepted and change nothing in a batch.
WITHOUT_EFFECT = frozenset(
    [
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "user",
        "verbosity",
    ]
)

# Fields that would change the text if they were honoured, with the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}

_NO_NUMBER = re.compile(rb"-?(?:NaN|Infinity)")
_CAPS = ("max_tokens", "max_completion_tokens")  # the second wins where both are given
_SAMPLING = frozenset(SamplingParameters.model_fields)
_LOGPROBS = frozenset({"logprobs", "top_logprobs"})  # OpenAI's two endpoints mean different things by them
PARAMETERS = frozenset(_SAMPLING | _LOGPROBS | set(_CAPS) | WITHOUT_EFFECT | set(UNSUPPORTED))
_PROMPT_FIELDS = frozenset({"prompt", "messages", "model", "custom_id", "id", "timeout_s"})
_LINE_FIELDS = frozenset({"custom_id", "id", "method", "url", "body"})
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "refusal", "tool_call_id"})  # the last three: without effect
_CALLS = frozenset({"tool_calls", "function_call", "audio"})  # of an assistant: what it did besides speaking
_ROLES = {role: role for role in get_args(ChatMessage.model_fields["role"].annotation)} | {"developer": "system"}


@dataclass(frozen=True, slots=True)
class Item:
    """What someone wrote for one request, and where: a line of a file (counted from 1) or a place in a list."""

    index: int
    value: Any
    line: int | None = None
    recovered_id: str | None = None  # by a line that can't be read: the value does not have it

    @property
    def location(self) -> str:
        """Where the item stands, for people."""
        return f"line {self.line}" if self.line is not None else f"requests[{self.index}]"

    @property
    def model(self) -> Any:
        """The model the item asks for, as it is written, or None."""
        fields = self.value.get("body", self.value) if isinstance(self.value, dict) else None
        return fields.get("model") if isinstance(fields, dict) else None

    @property
    def is_readable(self) -> bool:
        """True for what may be a request: a text or an object."""
        return isinstance(self.value, str | dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every request of one job."""

    job_id: str
    model: str
    endpoint: Endpoint
    defaults: Mapping[str, Any]  # sampling parameters of the job; a request's own win
    max_prompt_chars: int
    context_tokens: int | None = None  # of the workers that serve the model, if one is known


def read_lines(file: IO[bytes], max_line_bytes: int) -> Iterator[Item]:
    """Yield the items of a JSONL file. A line that is no JSON becomes an item that will be refused; blank ones vanish.

    Raise InvalidJsonLine behind the last line of a file that holds no requests but something else that is known.
    """
    sample: Sample | None = Sample()
    for index, line in enumerate(split_lines(iter(partial(file.read, _PIECE_BYTES), b""), max_line_bytes)):
        item = _read_line(index, line, max_line_bytes)
        if item.is_readable:
            sample = None
        elif sample is not None:
            sample.add(line.text)
        yield item
        del item  # before the next one is read: a line of 10 MB may be 400 MB as a value
    if sample is not None and sample.lines and (kind := describe_format(sample.lines)) is not None:
        raise InvalidJsonLine(kind)


def read_json(text: bytes) -> Any:
    """Return the value of a JSON text; raise ValueError for anything else, NaN and lone surrogates included.

    Brackets and braces are counted first, those in strings too: a text of nothing else takes forty times its size.
    """
    if text.count(b"[") + text.count(b"{") > MAX_JSON_NODES:
        raise ValueError(f"more than {MAX_JSON_NODES} lists and objects")
    return from_json(text, allow_inf_nan=False)


def parse_item(item: Item, rules: Rules) -> NewRequest:
    """Return the request of an item: valid, or with the failure for its error row. Never raises for content."""
    try:
        fields = _fields(item.value, rules.endpoint)
        for name in ("custom_id", "id"):
            if name in fields:
                check_custom_id(fields[name], name)
                break
        body = _request(fields, rules, item.index)
        timeout_s = _timeout_s(fields.get("timeout_s"))
        tokens = max_total_tokens(body, rules.context_tokens)
        return NewRequest(_id_of(item), body=body.model_dump(mode="json"), tokens=tokens, timeout_s=timeout_s)
    except RequestRefused as refused:
        return refused_request(refused, item)
    except MemoryError:
        raise  # of the machine: the same request may be read later
    except Exception:  # a fault of ours: it is this request's, and no reason to stop the others
        log.exception("Request %d of job %s can't be read", item.index, rules.job_id, extra=_about(item, rules))
        return refused_request(RequestFailed("The request can't be read."), item)


def _about(item: Item, rules: Rules) -> dict[str, object]:
    return {"action": "unreadable_request", "job_id": rules.job_id, "request_index": item.index}


def refused_request(refused: BasicError, item: Item) -> NewRequest:
    """Return the request of an item that can't be served, with the reason for its error row."""
    where = f"{item.location}, {refused.param}" if refused.param else item.location
    message, param = storable(f"{where}: {refused.message}"), refused.param and storable(refused.param)
    return NewRequest(
        _id_of(item), failure=RequestFailure(refused.code or "invalid_value", message, param, refused.status_code)
    )


def _id_of(item: Item) -> str:
    """Return the id an item came with, or one by its place. Who makes a job looks that no two are alike."""
    given = given_id(item)
    return default_id(item.index) if given is None else given.text


def parse_body(body: Any, rules: Rules) -> NewRequest:
    """Return the request of an OpenAI call by itself, from its body; raise RequestRefused."""
    if not isinstance(body, dict):
        raise InvalidValue("The body must be a JSON object.")
    fields = {name: value for name, value in body.items() if value is not None}
    text = "prompt" if rules.endpoint == COMPLETIONS_ENDPOINT else "messages"
    refuse_unknown(fields, PARAMETERS | {"model", text})
    for name in ("model", text):
        if name not in fields:
            raise MissingParameter(f"This call needs {name}.", param=name)
    request = _request(fields, rules, 0)
    return NewRequest(
        "request-0", body=request.model_dump(mode="json"), tokens=max_total_tokens(request, rules.context_tokens)
    )


def parse_parameters(
    fields: Mapping[str, Any], endpoint: Endpoint, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the sampling parameters among the fields; raise RequestRefused for the first that is wrong.

    `defaults` hold where the fields say nothing.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    refuse_unknown(given, PARAMETERS)
    _refuse_unsupported(given)
    parameters = {name: value for name, value in given.items() if name in _SAMPLING - _LOGPROBS}
    if given.keys() & _LOGPROBS:
        parameters["logprobs"] = _logprobs(given, endpoint, (defaults or {}).get("logprobs"))
    if "max_completion_tokens" in given:
        parameters["max_tokens"] = given["max_completion_tokens"]
    _sampling({"seed": 0} | parameters)
    return parameters


def max_total_tokens(request: GenerationRequest, context_tokens: int | None) -> int:
    """Return how many tokens a request may come to read and write, as far as one can say before it is tokenized."""
    text = request.prompt or "".join(message.content for message in request.messages or ())
    prompts = [prompt if isinstance(prompt, tuple) else prompt.encode() for prompt in request.prompts or (text,)]
    room = context_tokens or _CONTEXT_TOKENS
    most = 0
    for prompt in prompts:
        read = len(prompt) if isinstance(prompt, tuple) else len(prompt) // _BYTES_PER_TOKEN + 1
        most += read + request.sampling.n * (request.sampling.max_tokens or max(1, room - read))
    return most


def _read_line(index: int, line: Line, max_line_bytes: int) -> Item:
    try:
        return Item(index, read_line(line, max_line_bytes), line.number)
    except InvalidJsonLine as refused:
        return Item(index, refused, line.number, find_custom_id(line.text))


def read_value(index: int, value: Any) -> Item:
    """Return the item of a value out of a message that is not strict JSON as a whole."""
    text = json.dumps(value).encode()
    try:
        return Item(index, read_json(text))
    except ValueError as exc:
        return Item(index, InvalidJsonLine(f"The request is not JSON: {_why(text, exc)}."), None, find_custom_id(text))


def read_line(line: Line, max_bytes: int) -> Any:
    """Return the value of a line; raise InvalidJsonLine, which says why there is none."""
    if line.too_long:
        raise InvalidJsonLine(f"The line has more than {max_bytes} bytes.")
    try:
        return read_json(line.text)
    except ValueError as exc:
        raise InvalidJsonLine(f"The line is not JSON: {_why(line.text, exc)}.") from exc


def _why(text: bytes, exc: ValueError) -> str:
    """Return why a line is no JSON, in words that say what to do where the parser's don't."""
    reason, _, column = str(exc).partition(" at line 1 column ")  # the parser counts lines within this one
    if text.endswith(b","):
        reason, column = "it ends with a comma, and lines have none between them", ""
    elif reason == "expected value" and (number := _NO_NUMBER.match(text, int(column or 1) - 1)):
        reason = f"{number[0].decode()} is no number of JSON"
    elif reason == "invalid unicode code point":
        reason = "it is not UTF-8"
    elif "surrogate" in reason or reason == "unexpected end of hex escape":
        reason = "half of a surrogate pair is not valid text"
    return f"{reason} (column {column})" if column else reason


def given_id(item: Item) -> GivenId | None:
    """Return the custom_id an item came with, whatever else is wrong with it; None if there is none."""
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
    """Return a custom_id; raise InvalidValue for what can't be one."""
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidValue(f"A custom_id is a string of 1 to {MAX_CUSTOM_ID_CHARS} characters.", param=name)
    return clean_text(custom_id, name)


def _fields(value: Any, endpoint: str) -> dict[str, Any]:
    """Return the fields of an item as one flat object, whichever of its forms it came in."""
    if isinstance(value, RequestRefused):
        raise value
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidValue(f"A request is a string or an object, not {_kind(value)}.")
    fields = {name: inner for name, inner in value.items() if inner is not None}
    return _line_fields(fields, endpoint) if fields.keys() & {"body", "method", "url"} else fields


def _line_fields(line: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """Return the fields of an OpenAI batch line: those of its body, and its custom_id."""
    refuse_unknown(line, _LINE_FIELDS)
    if not is_post(line.get("method", "POST")):
        raise InvalidValue("The method must be POST.", param="method")
    if not is_url_of(line.get("url", endpoint), endpoint):
        raise InvalidValue(f"The url must be the job's endpoint, {endpoint}.", param="url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise MissingParameter("The body must be an object with the request's parameters.", param="body")
    names = {name: line[name] for name in ("custom_id", "id") if name in line}
    return {name: value for name, value in body.items() if value is not None} | names


def is_post(method: Any) -> bool:
    """Return whether a line's method is POST, in letters of any case."""
    return isinstance(method, str) and method.upper() == "POST"


def is_url_of(url: Any, endpoint: str) -> bool:
    """Return whether a line's url means the endpoint: also with a host, a slash at its end, or without /v1."""
    try:
        path = urlsplit(url).path.rstrip("/") if isinstance(url, str) else ""
    except ValueError:
        return False
    return path in (endpoint, endpoint.removeprefix("/v1"))


def _timeout_s(value: Any) -> float | None:
    """Return the seconds within which a request must end, counted from the recording of its job."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TIMEOUT_S:
        raise InvalidValue(f"must be a number of seconds above 0 and at most {MAX_TIMEOUT_S}", param="timeout_s")
    return float(value)


def _request(fields: Mapping[str, Any], rules: Rules, index: int) -> GenerationRequest:
    refuse_unknown(fields, _PROMPT_FIELDS | PARAMETERS)
    if fields.get("model", rules.model) != rules.model:
        raise InvalidValue(f"This job runs on {rules.model!r}; other models need a job of their own.", param="model")
    parameters = parse_parameters(
        {name: value for name, value in fields.items() if name in PARAMETERS}, rules.endpoint, rules.defaults
    )
    prompt = _prompt(fields, rules)
    sampling = _sampling_for(parameters, rules, index)
    _refuse_many(len(prompt.get("prompts", ())), sampling.n)
    return GenerationRequest(model=rules.model, sampling=sampling, **prompt)


def _sampling_for(parameters: Mapping[str, Any], rules: Rules, index: int) -> SamplingParameters:
    base: dict[str, Any] = {"seed": _seed(rules.job_id, index)}
    if rules.endpoint == COMPLETIONS_ENDPOINT:
        base["max_tokens"] = COMPLETIONS_MAX_TOKENS
    sampling = _sampling(base | dict(rules.defaults) | dict(parameters))
    limit = rules.context_tokens
    if limit is not None and sampling.max_tokens is not None and sampling.max_tokens > limit:
        raise InvalidValue(
            f"must be at most {limit}, the context of {rules.model}, not {sampling.max_tokens}", param="max_tokens"
        )
    return sampling if index < MAX_TRACED_REQUESTS else sampling.model_copy(update={"record_trees": 0})


def _sampling(parameters: Mapping[str, Any]) -> SamplingParameters:
    try:
        return SamplingParameters.model_validate(parameters, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        message = first["msg"].replace("Input should", "must")
        # What our own validators say is complete; pydantic's sentences gain by what was given.
        given = "" if first["type"] == "value_error" else f", not {_shown(first['input'])}"
        raise InvalidValue(f"{message}{given}", param=str(first["loc"][0])) from exc


def _logprobs(fields: Mapping[str, Any], endpoint: Endpoint, default: int | None) -> int | None:
    """Return how many alternatives are recovered beside each token; None if no log-probabilities are wanted."""
    logprobs, top = fields.get("logprobs"), fields.get("top_logprobs")
    if endpoint == COMPLETIONS_ENDPOINT:
        if top:
            raise InvalidValue(f"is for chats; on {endpoint}, logprobs is the number itself", param="top_logprobs")
        # Not `in (None, False)`: 0 == False in Python, and 0 asks for the tokens' own.
        wanted = logprobs is not None and logprobs is not False
        return _whole(logprobs, "logprobs", MAX_COMPLETION_LOGPROBS) if wanted else None
    if not isinstance(logprobs, bool | None):
        raise InvalidValue(
            f"must be true or false, not {_shown(logprobs)}; the number is top_logprobs", param="logprobs"
        )
    most = None if top is None else _whole(top, "top_logprobs", MAX_CHAT_LOGPROBS)
    if not (default is not None if logprobs is None else logprobs):
        if most:
            raise InvalidValue("needs logprobs to be true", param="top_logprobs")
        return None
    return most if most is not None else default or 0


def _whole(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidValue(f"must be a whole number from 0 to {most}, not {_shown(value)}", param=name)
    return value


def _seed(job_id: str, index: int) -> int:
    """Return the seed of a request that brings none. It is stored, so that a second run draws the same tokens."""
    digest = hashlib.sha256(f"{job_id}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: fits a signed integer everywhere


def _prompt(fields: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Return `messages` or `prompt` for the stored request; on the chat endpoint a prompt is one user message."""
    if "messages" in fields and "prompt" in fields:
        raise InvalidValue("Give either prompt or messages, not both.", param="messages")
    if "messages" in fields:
        return {"messages": _messages(fields["messages"], rules)}
    if "prompt" not in fields:
        raise MissingParameter("A request needs a prompt or messages.", param="prompt")
    if isinstance(fields["prompt"], list) and rules.endpoint == COMPLETIONS_ENDPOINT:
        return {"prompts": _prompts(fields["prompt"], rules)}
    prompt = _filled(_text(fields["prompt"], "prompt"), "prompt")
    _refuse_long(len(prompt), rules, "prompt")
    return {"prompt": prompt}


def _prompts(prompt: list[Any], rules: Rules) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts of a list: of texts, of token ids (one prompt), or of lists of token ids."""
    listed = [prompt] if all(type(part) is int for part in prompt) else prompt
    read = tuple(_one_prompt(part, f"prompt[{n}]") for n, part in enumerate(listed))
    _refuse_long(sum(len(part) for part in read), rules, "prompt")
    return read


def _one_prompt(prompt: Any, param: str) -> str | tuple[int, ...]:
    if not isinstance(prompt, list):
        return _filled(_text(prompt, param), param)
    if not prompt or not all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        raise InvalidValue("must be a text or a list of at least one token id", param=param)
    return tuple(prompt)


def _refuse_many(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise InvalidValue(
            f"{prompts} prompts with {n} choices each are more than {MAX_CHOICES} texts.", param="prompt"
        )


def _messages(messages: Any, rules: Rules) -> tuple[ChatMessage, ...]:
    if rules.endpoint == COMPLETIONS_ENDPOINT:
        raise InvalidValue(f"{COMPLETIONS_ENDPOINT} takes a prompt, not messages.", param="messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidValue("messages must be a list of at least one message.", param="messages")
    read = tuple(_message(message, f"messages[{n}]") for n, message in enumerate(messages))
    _refuse_long(sum(len(message.content) for message in read), rules, "messages")
    return read


def _message(message: Any, place: str) -> ChatMessage:
    if not isinstance(message, dict):
        raise InvalidValue(f"A message is an object with role and content, not {_kind(message)}.", param=place)
    fields = {name: value for name, value in message.items() if not _asks_for_nothing(name, value)}
    for name in fields.keys() & _CALLS:
        raise UnsupportedParameter("Calls of tools are not supported.", param=f"{place}.{name}")
    refuse_unknown(fields, _MESSAGE_FIELDS, f"{place}.")
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidValue(f"must be one of {', '.join(_ROLES)}, not {_shown(role)}", param=f"{place}.role")
    content = _content(fields.get("content"), f"{place}.content")
    if role == "user":
        _filled(content, f"{place}.content")
    return ChatMessage(role=_ROLES[role], content=content)


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether a field of a message says nothing: an answer that is sent back has many that are empty."""
    return value is None or (name not in ("role", "content") and value in ("", [], {}))


def _content(content: Any, param: str) -> str:
    """Return the text of a message: a string, or a list of text parts, joined."""
    if not isinstance(content, list):
        return _text(content, param)
    return "".join(_part(part, f"{param}[{n}]") for n, part in enumerate(content))


def _part(part: Any, param: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise UnsupportedParameter(f"Only parts of type text are supported, not {_shown(kind)}.", param=param)
    return _text(part.get("text"), f"{param}.text")


def _text(value: Any, param: str) -> str:
    if value is None:
        raise MissingParameter("The text is missing.", param=param)
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {_kind(value)}", param=param)
    return clean_text(value, param)


def clean_text(text: str, param: str) -> str:
    """Return the text; refuse what not every database and tokenizer can hold: NUL, and halves of surrogate pairs."""
    if "\0" in text:
        raise InvalidValue("The character U+0000 is not allowed.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidValue(
            f"Half of a surrogate pair at character {exc.start} is not valid text.", param=param
        ) from exc
    return text


def _filled(text: str, param: str) -> str:
    if not text.strip():
        raise InvalidValue("The text is empty.", param=param)
    return text


def _refuse_long(chars: int, rules: Rules, param: str) -> None:
    if chars > rules.max_prompt_chars:
        raise PromptTooLong(
            f"{chars} characters are more than the {rules.max_prompt_chars} one prompt may have.", param=param
        )


def refuse_unknown(fields: Mapping[str, Any], known: frozenset[str], place: str = "") -> None:
    """Raise UnknownParameter for the first field that is not known, with the nearest one that is."""
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UnknownParameter(f"This field is not known{hint}", param=f"{place}{name[:64]}")


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name in fields.keys() & UNSUPPORTED.keys():
        value = fields[name]
        if name == "best_of" and value == fields.get("n", 1) and type(value) is int:
            continue  # the best n of n
        # False == 0 in Python, and a logprobs of 0 does ask for something.
        if not any(type(value) is type(idle) and value == idle for idle in UNSUPPORTED[name]):
            raise UnsupportedParameter("This field is not supported yet; leave it out.", param=name)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else "a value of another kind")


def _shown(value: Any) -> str:
    """Show a value in an error message, briefly: the input may be huge."""
    if isinstance(value, list | dict):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
