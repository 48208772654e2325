"""Tools through `basic up` with SmolLM2, whose template takes none: calls that must be made are made, and fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import validate
from openai import OpenAI
from openai.types.chat import ChatCompletion

from jobs import Client
from tests.acceptance.conftest import Service

MODEL = "smollm2-135m-instruct"
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 12},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"Call {name}.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ADD: Any = {"type": "function", "function": {"name": "add"}}
ASKED: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
    "tools": TOOLS,
    "max_tokens": 200,
    "seed": 3,
    "parallel_tool_calls": False,
}


def calls_of(answer: ChatCompletion) -> list[tuple[str, Any]]:
    """Return the calls of all choices, each checked by its function's schema."""
    answer = ChatCompletion.model_validate(answer.to_dict())
    calls = []
    for choice in answer.choices:
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        for call in choice.message.tool_calls:
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            validate(arguments, SCHEMAS[call.function.name])
            calls.append((call.function.name, arguments))
    return calls


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_call_that_must_be_made_is_made_and_fits_its_schema(client: OpenAI, temperature: float) -> None:
    n = 4 if temperature else 1
    answer = client.chat.completions.create(**ASKED, tool_choice="required", temperature=temperature, n=n)
    assert len(calls_of(answer)) == n
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
    answer = client.chat.completions.create(**ASKED, tool_choice=ADD, temperature=temperature, n=n)
    assert [name for name, _ in calls_of(answer)] == ["add"] * n
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_streamed_call_is_the_whole_one(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, tool_choice="required", temperature=1).choices[0]
    with client.chat.completions.stream(**ASKED, tool_choice="required", temperature=1) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert whole.message.tool_calls is not None
    assert streamed.message.tool_calls is not None
    pairs = zip(whole.message.tool_calls, streamed.message.tool_calls, strict=True)
    for one, other in pairs:
        assert one.type == other.type == "function"
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"


def test_a_conversation_goes_on_with_the_result_of_a_call(client: OpenAI) -> None:
    first = client.chat.completions.create(**ASKED, tool_choice="required", temperature=0).choices[0].message
    assert first.tool_calls is not None
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "14 degrees and rain"}
    messages: Any = [*ASKED["messages"], first, result]
    second = client.chat.completions.create(**ASKED | {"messages": messages, "max_tokens": 20}, tool_choice="none")
    assert second.choices[0].message.content
    assert second.usage is not None
    assert second.usage.prompt_tokens > 150, "the prompt has the tools, the call and its result"


def test_a_model_that_may_call_answers_in_any_case(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED | {"max_tokens": 24}, temperature=1, n=4)
    for choice in ChatCompletion.model_validate(answer.to_dict()).choices:
        assert choice.message.content or choice.message.tool_calls
        assert choice.finish_reason in ("stop", "length", "tool_calls")


def test_the_requests_of_a_job_share_its_tools(service: Service) -> None:
    with Client(service.api_url) as jobs:
        prompts = [{"prompt": f"Add {n} and true.", "seed": n} for n in range(6)]
        job = jobs.submit(prompts, tools=TOOLS, tool_choice=ADD, temperature=1, max_tokens=200)
        outputs = list(job.outputs(follow=True))
    assert len(outputs) == 6
    for output in outputs:
        (call,) = output.choices[0].tool_calls
        assert call.function.name == "add"
        validate(json.loads(call.function.arguments), SCHEMAS["add"])
        assert not output.answer
    assert len({output.choices[0].tool_calls[0].id for output in outputs}) == 6
