"""Parse the input of one request into the request that is stored. Each field is supported, ignored or rejected.

An item is a string, an object with `prompt` or `messages`, or a line of an OpenAI batch file. An invalid item fails its
own request only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.errors import (
    BasicError,
    InvalidValue,
    MissingParameter,
    RequestFailed,
    RequestRefused,
)
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
from jobs.submission.carried import read_keep
from jobs.submission.custom_ids import GivenId, default_id, recovered
from jobs.submission.fields import PARAMETERS
from jobs.submission.items import Item
from jobs.submission.models import ModelNames
from jobs.submission.parameters.grammar import read_grammar
from jobs.submission.parameters.identity import IDENTITY_SEED, identity_of, with_identity_seed
from jobs.submission.parameters.reasoning import merged_options
from jobs.submission.parameters.sampling import (
    SAMPLING,
    body_fields,
    parameter_fields,
    parse_parameters,
    refuse_asking_for_nothing,
    sampling_parameters,
)
from jobs.submission.parameters.tools import read_tools
from jobs.submission.prompts import is_prefill, read_prompt
from jobs.submission.responses_api.chat_form import (
    History,
    as_given,
    read_conversation,
    read_options,
)
from jobs.submission.values import clean_text, kind, refuse_unknown
from storage.dialect import storable
from storage.records import NewRequest, RequestFailure

log = logging.getLogger(__name__)

MAX_CUSTOM_ID_CHARS = 64
MAX_CHOICES = 128  # of one request, over all its prompts: they are decoded together
_BYTES_PER_TOKEN = 4  # estimate for ordinary text
_CONTEXT_TOKENS = 4096  # assumed if no worker has reported its own
MAX_TRACED_REQUESTS = 16  # the first requests of a job, which may store draft trees
MAX_TIMEOUT_S = 30 * 86_400
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for raw prompts; chats have no default limit

_PROMPT_FIELDS = frozenset({"prompt", "messages", "model", "custom_id", "id", "timeout_s", "keep"})
_INPUT_FIELDS = frozenset({"input", "instructions", "previous_response_id", "prompt"})  # of /v1/responses
_LINE_FIELDS = frozenset({"custom_id", "id", "method", "url", "body", "keep"})


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
    owner: str = ""
    cache: bool | None = None  # of requests that do not say (jobs.submission.parameters.identity.cache_default)
    history: History = field(default_factory=History)


def parse_item(item: Item, rules: Rules) -> NewRequest:
    """Return the request of an item. An invalid item becomes a failed request; never raise for its content."""
    try:
        fields = _fields(item.value, rules.endpoint)
        for name in ("custom_id", "id"):
            if name in fields:
                check_custom_id(fields[name], name)
                break
        body, identity = _request(fields, rules, item.index)
        if "keep" in fields:
            body = body.model_copy(update={"keep": read_keep(fields["keep"])})
        timeout_s = _timeout_s(fields.get("timeout_s"))
        prompt, output = token_bounds(body, rules.context_tokens)
        return NewRequest(_id_of(item), body.stored(), None, prompt + output, prompt, timeout_s, identity=identity)
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
    request, identity = _request(fields, rules, 0)
    tokens = max_total_tokens(request, rules.context_tokens)
    return NewRequest("request-0", body=request.stored(), tokens=tokens, identity=identity)


_PROMPT_OF: Mapping[Endpoint, str] = {
    CHAT_ENDPOINT: "messages",
    COMPLETIONS_ENDPOINT: "prompt",
    RESPONSES_ENDPOINT: "input",
}


def _input_fields(endpoint: Endpoint) -> frozenset[str]:
    return _INPUT_FIELDS if endpoint == RESPONSES_ENDPOINT else frozenset()


def max_total_tokens(request: GenerationRequest, context_tokens: int | None) -> int:
    """Return the maximum number of tokens of a request, prompt and output, estimated before it is tokenized."""
    return sum(token_bounds(request, context_tokens))


def token_bounds(request: GenerationRequest, context_tokens: int | None) -> tuple[int, int]:
    """Return the prompt tokens of a request, estimated from its bytes, and the most tokens that its texts can have."""
    text = request.prompt or "".join(_texts(request))
    prompts = [prompt if isinstance(prompt, tuple) else prompt.encode() for prompt in request.prompts or (text,)]
    context = context_tokens or _CONTEXT_TOKENS
    total_prompt = total_output = 0
    for prompt in prompts:
        length = len(prompt) if isinstance(prompt, tuple) else len(prompt) // _BYTES_PER_TOKEN + 1
        room = max(1, context - length)
        cap = room if request.sampling.max_tokens is None else request.sampling.max_tokens
        total_prompt += length
        total_output += request.sampling.n * (cap if context_tokens is None else min(cap, room))
    return total_prompt, total_output


def _texts(request: GenerationRequest) -> Iterator[str]:
    """Yield the texts that a chat template may show."""
    for message in request.messages or ():
        yield message.content + (message.reasoning_content or "")
        yield from (call.name + call.arguments for call in message.tool_calls)
    if request.tools is not None:
        yield from (json.dumps(function.model_dump()) for function in request.tools.functions)


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
    """Return a valid custom_id, a whole number as text; raise InvalidValue otherwise."""
    if type(custom_id) is int and abs(custom_id) < 10**MAX_CUSTOM_ID_CHARS:
        custom_id = str(custom_id)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidValue(f"must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters, or a whole number.", param=name)
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
    names = {name: line[name] for name in ("custom_id", "id", "keep") if name in line}
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


def _request(fields: Mapping[str, Any], rules: Rules, index: int) -> tuple[GenerationRequest, str | None]:
    """Return the request of a body, and its identity, if equal requests have its answer."""
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
        request, identity = _chat_request({**given, "messages": conversation.messages}, rules, index)
    return request.model_copy(update={"response": read_options(fields)}), identity


def _parameters_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in PARAMETERS}


def _chat_request(fields: Mapping[str, Any], rules: Rules, index: int) -> tuple[GenerationRequest, str | None]:
    """Return the request of a body with `messages` or `prompt`, and its identity."""
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
    request = GenerationRequest(model=rules.model, sampling=sampling, tools=tools, grammar=grammar, **prompt, **options)
    asked = {**rules.defaults, **parameters}
    if asked.get("seed") == IDENTITY_SEED:
        request = with_identity_seed(request, rules.endpoint)
    return request, identity_of(request, rules.endpoint, rules.owner, asked, rules.cache)


def _sampling_for(parameters: Mapping[str, Any], rules: Rules, index: int) -> SamplingParameters:
    base: dict[str, Any] = {"seed": _seed(rules.job_id, index)}
    if rules.endpoint == COMPLETIONS_ENDPOINT:
        base["max_tokens"] = COMPLETIONS_MAX_TOKENS
    given = {**rules.defaults, **parameters}
    if given.get("seed") == IDENTITY_SEED:
        given["seed"] = 0
    sampling = sampling_parameters(base | {name: value for name, value in given.items() if name in SAMPLING})
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
    refuse_asking_for_nothing(sampling)


def _seed(job_id: str, index: int) -> int:
    """Return the default seed of a request. It is stored, so that running the request again gives the same tokens."""
    digest = hashlib.sha256(f"{job_id}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit a signed 64-bit integer


def _refuse_many(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise InvalidValue(
            f"{prompts} prompts with {n} choices each are more than {MAX_CHOICES} texts.", param="prompt"
        )
