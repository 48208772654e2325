"""Parse the parameters of a request or a job: which fields are honoured, by which names, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.messages import COMPLETIONS_ENDPOINT, RESPONSES_ENDPOINT, Endpoint, SamplingParameters
from jobs.submission.fields import PARAMETERS, Field, Treatment, field_of
from jobs.submission.parameters.identity import IDENTITY_SEED, cache_option
from jobs.submission.parameters.reasoning import chat_options
from jobs.submission.parameters.tools import tool_options
from jobs.submission.responses_api.chat_form import chat_parameters
from jobs.submission.values import boolean, kind, refuse_unknown, shown, whole

MAX_CHAT_LOGPROBS = 20  # alternatives per token, OpenAI's limit
MAX_COMPLETION_LOGPROBS = 5
SAMPLING = frozenset(SamplingParameters.model_fields)
_MAX_CAP = 2**31 - 1  # of max_tokens; larger ones mean the same: to the context's end
_LOGPROB_FIELDS = frozenset({"logprobs", "top_logprobs"})  # have different meanings on OpenAI's two endpoints


def parse_parameters(
    fields: Mapping[str, Any], endpoint: Endpoint, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the sampling parameters and chat options in `fields`; raise RequestRefused for the first invalid one.

    `defaults` are the job's parameters; None: these are.
    """
    asked, names = _asked(parameter_fields(fields, endpoint), endpoint)
    parameters = {name: value for name, value in asked.items() if name in SAMPLING - _LOGPROB_FIELDS}
    if asked.keys() & _LOGPROB_FIELDS:
        parameters["logprobs"] = _logprobs(asked, endpoint, (defaults or {}).get("logprobs"))
    if "max_completion_tokens" in asked:
        parameters["max_tokens"] = asked["max_completion_tokens"]
    if type(cap := parameters.get("max_tokens")) is int:
        parameters["max_tokens"] = min(cap, _MAX_CAP)
    seed = {"seed": 0} if parameters.get("seed") == IDENTITY_SEED else {}  # known when the whole request is
    sampling = sampling_parameters({"seed": 0} | parameters | seed, names)
    if defaults is None:  # else those of the job may ask for something
        refuse_asking_for_nothing(sampling)
    return parameters | chat_options(asked, endpoint) | tool_options(asked, endpoint) | cache_option(asked)


def parameter_fields(fields: Mapping[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """Return the parameters in `fields`, in the words of a chat; raise RequestRefused for unknown ones."""
    given = body_fields(fields)
    refuse_unknown(given, PARAMETERS)
    return chat_parameters(given) if endpoint == RESPONSES_ENDPOINT else given


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


def refuse_asking_for_nothing(sampling: SamplingParameters) -> None:
    """Raise InvalidValue for max_tokens 0 without a field that asks for something of the prompt."""
    if sampling.max_tokens == 0 and not sampling.echo and sampling.prompt_logprobs is None:
        raise InvalidValue(
            "must be greater than or equal to 1, not 0; 0 is for requests with echo or prompt_logprobs",
            param="max_tokens",
        )


def sampling_parameters(
    parameters: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})
) -> SamplingParameters:
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
