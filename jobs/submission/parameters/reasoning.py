"""Parse the fields of a chat that control its reasoning and its chat template.

vLLM, SGLang, OpenAI, OpenRouter, DeepSeek and Anthropic name the same option differently, and all names are accepted.
If fields contradict each other, the most direct one counts: `chat_template_kwargs`, `enable_thinking`, `thinking`,
`reasoning`, then `reasoning_effort`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.messages import COMPLETIONS_ENDPOINT, Endpoint
from jobs.submission.fields import BUDGET
from jobs.submission.values import boolean, clean_text, kind, object_fields, shown

Fields = Mapping[str, Any]

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_TEMPLATE_ARGUMENTS: Final = 64
MAX_TEMPLATE_ARGUMENT_CHARS: Final = 10_000  # of all of them as JSON
# Names that the service itself passes to templates, or that transformers defines in them.
RESERVED_ARGUMENTS: Final = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"),
        *("raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum", "cycler", "joiner"),
        *("loop", "self", "varargs", "kwargs", "caller"),
    }
)
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_RAW: Final = "Raw prompts have no chat template and no reasoning; use /v1/chat/completions."


def chat_options(asked: Fields, endpoint: Endpoint) -> dict[str, Any]:
    """Return `chat_template_kwargs` and `reasoning` of the stored request, each only if it says something.

    `asked` are the honoured fields of a body. Raise RequestRefused for an invalid one, and for any on raw prompts.
    """
    for name in (name for name in _READERS if name in asked and endpoint == COMPLETIONS_ENDPOINT):
        raise UnsupportedParameter(f"{_RAW} Leave the field out.", param=name)
    options: dict[str, Any] = {}
    if "chat_template_kwargs" in asked:
        options["chat_template_kwargs"] = _template_arguments(asked["chat_template_kwargs"])
    reasoning: dict[str, Any] = {}
    for name, read in _READERS.items():  # the most direct spelling last
        if name in asked and read is not None:
            reasoning |= read(asked[name], name)
    if reasoning:
        options["reasoning"] = reasoning
    return options


def merged_options(defaults: Fields, own: Fields) -> dict[str, Any]:
    """Return the options of a request: its own, and those of its job that it does not set."""
    names = ("chat_template_kwargs", "reasoning")
    return {name: {**defaults.get(name, {}), **own.get(name, {})} for name in names if name in defaults or name in own}


def _template_arguments(value: Any) -> dict[str, Any]:
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        raise InvalidValue(f"must be an object, not {kind(value)}", param=param)
    if len(value) > MAX_TEMPLATE_ARGUMENTS or len(json.dumps(value)) > MAX_TEMPLATE_ARGUMENT_CHARS:
        raise InvalidValue(
            f"must have at most {MAX_TEMPLATE_ARGUMENTS} names and {MAX_TEMPLATE_ARGUMENT_CHARS} characters of JSON",
            param=param,
        )
    for name in value:
        where = f"{param}.{name[:64]}"
        if not _NAME.fullmatch(name):
            raise InvalidValue("is not a name that a chat template can read", param=where)
        if name in RESERVED_ARGUMENTS or name.endswith("_token"):
            raise InvalidValue("is set by the service; leave it out", param=where)
    _check_texts(value, param)
    return value


def _check_texts(value: Any, param: str) -> None:
    """Refuse texts that can't be stored, in names and values of any depth."""
    if isinstance(value, str):
        clean_text(value, param)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(name, param)
            _check_texts(inner, f"{param}.{name[:64]}")
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner, param)


def _effort(value: Any, param: str) -> dict[str, Any]:
    if value not in EFFORTS:
        raise InvalidValue(f"must be one of {', '.join(EFFORTS)}, not {shown(value)}", param=param)
    return {"effort": value, "enabled": value != "none"}


def _enabled(value: Any, param: str) -> dict[str, Any]:
    return {"enabled": boolean(value, param)}


def _included(value: Any, param: str) -> dict[str, Any]:
    return {"included": boolean(value, param)}


def _separate(value: Any, param: str) -> dict[str, Any]:
    return {"separate": boolean(value, param)}


def _thinking(value: Any, param: str) -> dict[str, Any]:
    """Read `thinking`: a boolean, or an object with a type, as of Anthropic, DeepSeek and GLM."""
    if isinstance(value, bool):
        return {"enabled": value}
    fields = _known_fields(value, param, ("type", "budget_tokens", "clear_thinking", "display"))
    if "budget_tokens" in fields:
        raise UnsupportedParameter(BUDGET, param=f"{param}.budget_tokens")
    states = {"enabled": True, "adaptive": True, "disabled": False}
    named = fields.get("type")
    if not isinstance(named, str) or named not in states:
        raise InvalidValue(f"must be one of {', '.join(states)}, not {shown(named)}", param=f"{param}.type")
    return {"enabled": states[named]}


def _reasoning(value: Any, param: str) -> dict[str, Any]:
    """Read `reasoning`: an object, as of OpenRouter and the Responses API."""
    fields = _known_fields(value, param, ("effort", "enabled", "exclude", "max_tokens", "summary", "generate_summary"))
    if "max_tokens" in fields:
        raise UnsupportedParameter(BUDGET, param=f"{param}.max_tokens")
    read = _effort(fields["effort"], f"{param}.effort") if "effort" in fields else {}
    if "enabled" in fields:
        read |= _enabled(fields["enabled"], f"{param}.enabled")
    if "exclude" in fields:
        read["included"] = not boolean(fields["exclude"], f"{param}.exclude")
    return read


def _known_fields(value: Any, param: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of an object that are not null; raise InvalidValue for unknown ones."""
    fields = object_fields(value, param)
    for name in value:
        if name not in known:
            raise InvalidValue(f"is none of {', '.join(known)}", param=f"{param}.{name[:64]}")
    return fields


_READERS: Final[Mapping[str, Callable[[Any, str], dict[str, Any]] | None]] = MappingProxyType(
    {
        "reasoning_effort": _effort,
        "reasoning": _reasoning,
        "thinking": _thinking,
        "enable_thinking": _enabled,
        "include_reasoning": _included,
        "separate_reasoning": _separate,
        "chat_template_kwargs": None,
    }
)
