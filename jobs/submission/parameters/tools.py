"""Parse the tools of a chat: functions that the model may call, which of them, and how many at once.

The arguments of a call are bound by the function's schema. One that can't be held exactly is refused if it must bind:
the function is strict or the call is forced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from jobs.errors import InvalidValue, MissingParameter, PromptTooLong, UnsupportedParameter
from jobs.grammar.compiler import check
from jobs.messages import COMPLETIONS_ENDPOINT, Endpoint, FunctionTool, GrammarSpec, ToolChoice, Tools
from jobs.submission.values import boolean, holds_nul, kind, shown

TOOL_FIELDS: Final = ("tools", "tool_choice", "parallel_tool_calls")
MAX_TOOLS: Final = 128
MAX_TOOL_CHARS: Final = 200_000  # of one definition as JSON
_CACHED_CHARS: Final = 20_000
_RAW: Final = "Raw prompts have no tools; use /v1/chat/completions."
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES: Final[Mapping[str, ToolChoice]] = {"none": "none", "auto": "auto", "required": "required"}


def tool_options(asked: Mapping[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """Return those of the TOOL_FIELDS that a body has; raise RequestRefused for invalid tools, and for raw prompts."""
    options = {name: asked[name] for name in TOOL_FIELDS if name in asked}
    if endpoint == COMPLETIONS_ENDPOINT:
        for name in options.keys() - {"parallel_tool_calls"}:
            if options[name] not in ("none", "auto"):
                raise UnsupportedParameter(f"{_RAW} Leave the field out.", param=name)
        return {}
    if "tools" in options:
        _functions(options["tools"])
    return options


def read_tools(fields: Mapping[str, Any], max_chars: int) -> Tools | None:
    """Return the tools of a request from its TOOL_FIELDS, None without tools; raise RequestRefused for invalid ones.

    Together they have at most `max_chars` characters as JSON.
    """
    functions = _functions(fields.get("tools") or ())
    choice, names = _choice(fields.get("tool_choice", "auto"), [function.name for function in functions])
    parallel = boolean(fields.get("parallel_tool_calls", True), "parallel_tool_calls")
    if not functions:
        return None
    _refuse_long(fields["tools"], max_chars)
    tools = Tools(functions=functions, choice=choice, names=names, parallel=parallel)
    _refuse_unbound(tools)
    return tools


def _refuse_unbound(tools: Tools) -> None:
    """Raise the refusal of the first schema that can't be held and must be."""
    callable_names = {function.name for function in tools.callable}
    for n, function in enumerate(tools.functions):
        if not function.bound and (function.strict or (tools.forced and function.name in callable_names)):
            _check_schema(function.model_copy(update={"bound": True}), f"tools[{n}].function")


def _refuse_long(tools: Any, max_chars: int) -> None:
    chars = len(json.dumps(tools, ensure_ascii=False))
    if chars > max_chars:
        raise PromptTooLong(f"The tools have {chars} characters as JSON; the limit is {max_chars}.", param="tools")


def _functions(tools: Any) -> tuple[FunctionTool, ...]:
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InvalidValue(f"must be a list of tools, not {kind(tools)}", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidValue(f"must have at most {MAX_TOOLS} tools, not {len(tools)}", param="tools")
    functions = tuple(_tool(tool, f"tools[{n}]") for n, tool in enumerate(tools))
    names: dict[str, int] = {}
    for n, function in enumerate(functions):
        if (first := names.setdefault(function.name, n)) != n:
            raise InvalidValue(
                f"tools[{first}] has the same name, {function.name!r}.", param=f"tools[{n}].function.name"
            )
    return functions


def other_tool(tool: Mapping[str, Any], param: str) -> UnsupportedParameter:
    """Return the refusal of a tool, or of a choice, that is not of type function."""
    what = shown(tool.get("type"))
    return UnsupportedParameter(f"Only tools of type function are supported, not {what}.", param=f"{param}.type")


def _tool(tool: Any, param: str) -> FunctionTool:
    if not isinstance(tool, dict):
        raise InvalidValue(f"A tool is an object with type and function, not {kind(tool)}.", param=param)
    if tool.get("type", "function") != "function":
        raise other_tool(tool, param)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise MissingParameter(
            "An object with name, description and parameters is required.", param=f"{param}.function"
        )
    text = json.dumps(function, ensure_ascii=False)
    if holds_nul(text):
        raise InvalidValue("The character U+0000 is not allowed.", param=f"{param}.function")
    if len(text) > MAX_TOOL_CHARS:
        raise InvalidValue(
            f"has {len(text)} characters as JSON; the limit is {MAX_TOOL_CHARS}", param=f"{param}.function"
        )
    read = _function if len(text) <= _CACHED_CHARS else _function.__wrapped__
    return read(text, f"{param}.function")


@lru_cache(maxsize=512)  # the lines of a file mostly have the same tools
def _function(definition: str, param: str) -> FunctionTool:
    fields = {name: value for name, value in json.loads(definition).items() if value is not None}
    name = fields.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValue("must have 1 to 64 letters, digits, underscores and dashes", param=f"{param}.name")
    if not isinstance(fields.get("description", ""), str):
        raise InvalidValue(f"must be a string, not {kind(fields['description'])}", param=f"{param}.description")
    strict = boolean(fields.get("strict", False), f"{param}.strict")
    parameters = fields.get("parameters")
    if parameters is not None:
        _check_object(parameters, f"{param}.parameters")
    function = FunctionTool(name=name, description=fields.get("description"), parameters=parameters, strict=strict)
    try:
        _check_schema(function, param)
    except UnsupportedParameter:
        return function.model_copy(update={"bound": False})
    return function


def _check_schema(function: FunctionTool, param: str) -> None:
    """Raise RequestRefused if a schema of arguments is invalid; UnsupportedParameter if it can't be held."""
    schema = json.dumps(function.arguments_schema, ensure_ascii=False)
    check(GrammarSpec(kind="json_schema", value=schema, whitespace=""), f"{param}.parameters")


def _check_object(schema: Any, param: str) -> None:
    if not isinstance(schema, dict):
        raise InvalidValue(f"must be a JSON schema, not {kind(schema)}", param=param)
    if "type" in schema and schema["type"] != "object":
        raise InvalidValue(
            f"must be object, not {shown(schema['type'])}: arguments are an object", param=f"{param}.type"
        )


def _choice(choice: Any, names: list[str]) -> tuple[ToolChoice, tuple[str, ...] | None]:
    """Return the tool choice, and the names of the functions that it allows; None: all."""
    if isinstance(choice, str) and choice in _CHOICES:
        if choice == "required" and not names:
            raise InvalidValue("needs tools", param="tool_choice")
        return _CHOICES[choice], None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return "named", (_named(choice, names, "tool_choice"),)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), names)
    raise InvalidValue(
        f'must be none, auto, required or {{"type": "function", "function": {{"name": "…"}}}}, not {shown(choice)}',
        param="tool_choice",
    )


def _named(reference: Any, names: list[str], param: str) -> str:
    function = reference.get("function") if isinstance(reference, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise MissingParameter("The name of a function is required.", param=f"{param}.function.name")
    if name not in names:
        raise InvalidValue(f"no tool has the name {shown(name)}", param=f"{param}.function.name")
    return name


def _allowed(allowed: Any, names: list[str]) -> tuple[ToolChoice, tuple[str, ...]]:
    param = "tool_choice.allowed_tools"
    mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required"):
        raise InvalidValue("must be an object with mode, auto or required, and tools", param=param)
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools:
        raise InvalidValue("must be a list of at least one tool", param=f"{param}.tools")
    found = tuple(_named(tool, names, f"{param}.tools[{n}]") for n, tool in enumerate(tools))
    return _CHOICES[mode], found
