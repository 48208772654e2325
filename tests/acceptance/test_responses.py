"""The Responses API with OpenAI's client, as its guides show it, against a real server and worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AzureOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel, Field

from tests.acceptance.conftest import Service
from tests.acceptance.test_openai import MODEL, checked, ended, lines_of, submitted

RESPONSES = "/v1/responses"
ASKED: dict[str, Any] = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0}


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.api_url}/v1", api_key="unused", timeout=120) as client:
        yield client


def settled(client: OpenAI, response: Response) -> Response:
    """Poll until a response has ended, as OpenAI's guide to background mode does."""
    deadline = time.monotonic() + 120
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.1)
        response = checked(client.responses.retrieve(response.id))
    return response


def test_a_response_is_the_chat_of_its_conversation_whole_streamed_read_again_and_in_a_batch(
    client: OpenAI, service: Service
) -> None:
    sampled: dict[str, Any] = {"model": MODEL, "temperature": 1, "extra_body": {"seed": 7}}
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name two rivers."}]
    chat = client.chat.completions.create(messages=messages, max_tokens=20, **sampled).choices[0]
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "input": "Name two rivers.",
        "max_output_tokens": 20,
        **sampled,
    }
    whole = checked(client.responses.create(**asked))
    assert whole.output_text == chat.message.content
    assert (whole.status == "incomplete") == (chat.finish_reason == "length")
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert deltas == whole.output_text
    again = list(client.responses.retrieve(last.response.id, stream=True, starting_after=4))
    assert [event.sequence_number for event in again] == [event.sequence_number for event in events[5:]]
    assert checked(client.responses.retrieve(whole.id)) == whole
    body = {name: value for name, value in asked.items() if name != "extra_body"} | {"seed": 7}
    line = {"custom_id": "a", "method": "POST", "url": RESPONSES, "body": body}
    (written,) = lines_of(client, ended(client, submitted(client, [line], RESPONSES)).output_file_id).values()
    assert Response.model_validate(written["response"]["body"]).output_text == whole.output_text
    with AzureOpenAI(azure_endpoint=service.api_url, api_version="2024-10-21", api_key="unused") as azure:
        assert azure.responses.create(**asked).output_text == whole.output_text


def test_a_background_response_is_streamed_later_by_two_readers_alike_and_continued(client: OpenAI) -> None:
    queued = checked(client.responses.create(**ASKED, max_output_tokens=30, background=True))
    assert queued.status in ("queued", "in_progress")
    early = list(client.responses.retrieve(queued.id, stream=True))
    done = settled(client, queued)
    assert "Paris" in done.output_text
    assert list(client.responses.retrieve(queued.id, stream=True)) == early
    more = client.responses.create(model=MODEL, input="And of Italy?", previous_response_id=done.id, temperature=0)
    messages: Any = [
        {"role": "user", "content": ASKED["input"]},
        {"role": "assistant", "content": done.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert more.output_text == chat.choices[0].message.content


def test_a_background_response_is_cancelled_while_it_runs_and_a_stream_by_its_end(client: OpenAI) -> None:
    endless: dict[str, Any] = {**ASKED, "extra_body": {"ignore_eos": True}}
    running = client.responses.create(**endless, background=True)
    for event in client.responses.retrieve(running.id, stream=True):
        if event.type == "response.output_text.delta":
            break
    assert checked(client.responses.cancel(running.id)).status == "cancelled"
    stream = client.responses.create(**endless, stream=True)
    first = next(iter(stream))
    assert first.type == "response.created"
    stream.close()
    assert settled(client, first.response).status == "cancelled"


def test_a_prompt_that_is_too_long_is_an_error_of_the_input(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="word " * 20_000, stream=stream)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")


class City(BaseModel):
    """What a response is parsed into."""

    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=10**6)


def test_a_response_is_parsed_into_a_class_whole_and_streamed(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Describe Paris.", "temperature": 0}
    whole = client.responses.parse(text_format=City, **asked)
    assert whole.status == "completed"
    with client.responses.stream(text_format=City, **asked) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed is not None


def test_a_function_is_called_and_its_result_continues_the_conversation_both_ways(client: OpenAI) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "name": "get_weather", "parameters": city | {"additionalProperties": False}}
    question: Any = {"role": "user", "content": "What is the weather in Paris?"}
    asked: dict[str, Any] = {"model": MODEL, "tools": [tool], "temperature": 0, "max_output_tokens": 40}
    forced = asked | {"tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(input=[question], **forced) as stream:
        called = checked(stream.get_final_response())
    (call,) = called.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)["city"] in ("Paris", "Rome")) == ("get_weather", True)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    stored = client.responses.create(input=[result], previous_response_id=called.id, **asked)
    items: Any = [question, call.to_dict(), result]
    given = client.responses.create(input=items, **asked)
    assert [item.to_dict() | {"id": ""} for item in stored.output] == [
        item.to_dict() | {"id": ""} for item in given.output
    ]
