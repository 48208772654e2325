"""Tools at the door: what OpenAI's clients send is stored, and everything else is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, GenerationRequest, Tools
from jobs.submission.items import Item
from jobs.submission.parameters.sampling import parse_parameters
from jobs.submission.request_parser import Rules, parse_item
from storage.records import RequestFailure

CITY = {"type": "object", "properties": {"zone": {"type": "string"}, "city": {"type": "string"}}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "parameters": CITY}}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "Add.", "strict": True}}
NAMED = {"type": "function", "function": {"name": "add"}}
USER = {"role": "user", "content": "hi"}


def parsed(fields: dict[str, Any], defaults: dict[str, Any] | None = None) -> GenerationRequest | RequestFailure:
    rules = Rules("batch_1", "tiny", CHAT_ENDPOINT, defaults or {}, max_prompt_chars=10_000)
    request = parse_item(Item(0, {"messages": [USER], **fields}, line=7), rules)
    return request.failure or GenerationRequest.model_validate(request.body)


def tools_of(fields: dict[str, Any], defaults: dict[str, Any] | None = None) -> Tools | None:
    request = parsed(fields, defaults)
    assert isinstance(request, GenerationRequest), request
    return request.tools


def refusal(fields: dict[str, Any]) -> str:
    failure = parsed(fields)
    assert isinstance(failure, RequestFailure)
    assert failure.param is not None
    assert failure.message.startswith(f"line 7, {failure.param}: "), failure.message
    return failure.param


def call(identity: Any = "call_1", name: Any = "add", arguments: Any = '{"a": 1}') -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("choice", "stored", "callable_names"),
    [
        (None, "auto", ["get_time", "add"]),
        ("auto", "auto", ["get_time", "add"]),
        ("none", "none", []),
        ("required", "required", ["get_time", "add"]),
        (NAMED, "named", ["add"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, "required", ["add"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, "auto", ["add"]),
    ],
)
def test_a_choice_says_which_functions_the_model_may_or_must_call(
    choice: Any, stored: str, callable_names: list[str]
) -> None:
    tools = tools_of({"tools": [TIME, ADD], "tool_choice": choice})
    assert tools is not None
    assert tools.choice == stored
    assert [function.name for function in tools.callable] == callable_names
    assert tools.parallel


def test_a_request_without_tools_is_stored_as_before() -> None:
    idle: list[dict[str, Any]] = [
        {},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": False},
    ]
    for fields in idle:
        request = parsed(fields)
        assert isinstance(request, GenerationRequest)
        assert request.tools is None
        assert "tools" not in request.model_dump(mode="json")


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    tools = tools_of({"tools": [TIME], "parallel_tool_calls": False})
    assert tools is not None
    assert list((tools.functions[0].parameters or {})["properties"]) == ["zone", "city"]
    assert not tools.parallel


def test_the_tools_of_a_job_are_those_of_its_requests_and_a_request_overrides_each_field() -> None:
    defaults = parse_parameters({"tools": [TIME, ADD], "tool_choice": "required"}, CHAT_ENDPOINT)
    shared = tools_of({}, defaults)
    assert shared is not None
    assert (len(shared.functions), shared.choice) == (2, "required")
    own = tools_of({"tool_choice": NAMED}, defaults)
    assert own is not None
    assert own.choice == "named"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": ["add"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "add"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "n" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a", "description": 1}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": "a", "description": "\0"}}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a", "description": "x" * 200_000}}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
        ),
        ({"tools": [{"function": {"name": "a", "description": "x" * 10_000}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [TIME], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"function_call": {"name": "a"}}, "function_call"),
    ],
)
def test_an_invalid_tool_is_refused_with_its_line_and_place(fields: dict[str, Any], param: str) -> None:
    assert refusal(fields) == param


def test_a_tool_of_another_type_is_an_unsupported_parameter() -> None:
    failure = parsed({"tools": [{"type": "custom", "custom": {"name": "sql"}}]})
    assert isinstance(failure, RequestFailure)
    assert (failure.code, failure.param) == ("unsupported_parameter", "tools[0].type")


def test_a_schema_that_can_t_be_held_is_refused_where_it_must_bind_and_is_any_object_elsewhere() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "string"}}}}
    tool: dict[str, Any] = {"function": {"name": "f", "parameters": schema}}
    tools = tools_of({"tools": [TIME, tool]})
    assert tools is not None
    assert [function.bound for function in tools.functions] == [True, False]
    assert tools.functions[1].parameters == schema, "the prompt has it all the same"
    assert tools.functions[1].arguments_schema == {"type": "object"}
    strict = {"function": {**tool["function"], "strict": True}}
    place = "tools[1].function.parameters.properties.a"
    assert refusal({"tools": [TIME, strict]}).startswith(place)
    assert refusal({"tools": [TIME, tool], "tool_choice": "required"}).startswith(place)
    other = {"type": "function", "function": {"name": "get_time"}}
    assert tools_of({"tools": [TIME, tool], "tool_choice": other}) is not None, "it can't be called"
    assert refusal({"tools": [{"function": {"name": "f", "parameters": {"properties": 1}}}]}).startswith("tools[0]")


def test_a_backslash_before_u0000_is_text() -> None:
    assert tools_of({"tools": [{"function": {"name": "a", "description": "\\u0000"}}]}) is not None


def test_raw_prompts_take_no_tools() -> None:
    rules = Rules("batch_1", "tiny", COMPLETIONS_ENDPOINT, {}, max_prompt_chars=100)
    failure = parse_item(Item(0, {"prompt": "x", "tools": [TIME]}), rules).failure
    assert failure is not None
    assert failure.param == "tools"


def test_a_history_keeps_its_calls_and_results_know_their_function() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(), call("call_2", "get_time", {})]},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
        {"role": "tool", "content": "3"},
    ]
    request = parsed({"messages": messages})
    assert isinstance(request, GenerationRequest)
    _, called, noon, three = request.messages or ()
    assert [(one.name, one.arguments) for one in called.tool_calls] == [("add", '{"a": 1}'), ("get_time", "{}")]
    assert called.content == ""
    assert (noon.name, noon.tool_call_id) == ("get_time", "call_2")
    assert (three.name, three.tool_call_id) == ("add", "call_1"), "without an id it answers the first open call"
    plain = parsed({"messages": [USER, {"role": "tool", "content": "3"}]})
    assert isinstance(plain, GenerationRequest)
    assert plain.model_dump(mode="json")["messages"][1] == {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": "x", "content": ""}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "", "tool_calls": [call()]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [call(None)]}], "messages[0].tool_calls[0].id"),
        ([{"role": "assistant", "tool_calls": [call(name=1)]}], "messages[0].tool_calls[0].function.name"),
        ([{"role": "assistant", "tool_calls": [call(arguments="{")]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [call(arguments="[]")]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "function_call": {"name": "f"}}], "messages[0].function_call"),
    ],
)
def test_an_invalid_call_in_a_history_is_refused_with_its_place(messages: list[Any], param: str) -> None:
    assert refusal({"messages": messages}) == param
