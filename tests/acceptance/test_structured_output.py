"""Structured output through every door, by the openai client, with a real worker: each finished answer is valid."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from jobs import Client
from jobs.errors import AnswerUnreadable
from tests.acceptance.conftest import Service

MODEL = "smollm2-135m-instruct"
MESSAGES: Any = [{"role": "user", "content": "Describe the city of Bern as JSON."}]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=10**7)
    rivers: list[str] = Field(max_length=2)


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: list[dict[str, Any]] = [
    an_object(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    an_object(tags={"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3}),
    an_object(price={"type": "number", "exclusiveMinimum": 0, "maximum": 100}, sold={"type": "boolean"}),
    an_object(day={"type": "string", "format": "date"}, id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    {
        "oneOf": [
            an_object(kind={"const": "x"}, n={"type": "integer", "maximum": 9, "minimum": 0}),
            an_object(kind={"const": "y"}),
        ]
    },
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"enum": ["yes", "no", 3, None]},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": an_object(v={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})
        },
    },
    an_object(
        a={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000}, b={"not": {"enum": ["b"]}, **SHORT}
    ),
    {
        "type": "object",
        "patternProperties": {"^x[a-z]{0,3}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
]


def asked(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def check(text: str, finish_reason: str | None, schema: dict[str, Any]) -> bool:
    """Whether a text is finished; it is valid then, and was cut otherwise."""
    if finish_reason == "length":
        return False
    assert finish_reason == "stop"
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return True


def test_parse_of_the_openai_client_returns_an_instance_of_the_class(client: OpenAI, service: Service) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=City, temperature=0, max_tokens=300
    )
    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(completion.choices[0].message.parsed, City)

    async def parse() -> Any:
        async with AsyncOpenAI(base_url=f"{service.api_url}/v1", api_key="unused") as other:
            return await other.chat.completions.parse(
                model=MODEL, messages=MESSAGES, response_format=City, temperature=0, max_tokens=300
            )

    assert asyncio.run(parse()).choices[0].message.parsed == completion.choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=City, max_tokens=5)


def test_streamed_and_whole_answers_are_the_same_and_bound(client: OpenAI) -> None:
    for extra in ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, {"structured_outputs": {"choice": ["Aare", "Rhône", "Aar"]}}):
        call: Any = {"model": MODEL, "messages": MESSAGES, "temperature": 1, "seed": 3, "extra_body": extra}
        whole = client.chat.completions.create(**call).choices[0].message.content
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**call, stream=True)
        )
        assert streamed == whole
        assert re.fullmatch("[0-9]{3}-[a-f]{2}|Aare|Rhône|Aar", whole or "")
    text = client.completions.create(model=MODEL, prompt="2 + 2 =", extra_body={"grammar": 'start: " " /[0-9]/'})
    assert re.fullmatch(" [0-9]", text.choices[0].text)


def test_a_schema_that_can_not_be_held_is_refused_with_its_place(client: OpenAI) -> None:
    schema = an_object(tags={"type": "array", "uniqueItems": True})
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=asked(schema))  # type: ignore[call-overload]
    assert refused.value.param == "response_format.json_schema.schema.properties.tags.uniqueItems"


def test_ten_schemas_at_temperature_1_finish_valid_through_every_door(
    client: OpenAI, service: Service, tmp_path: Path
) -> None:
    parameters = {"temperature": 1, "max_tokens": 120}
    bodies = [
        {"model": MODEL, "messages": MESSAGES, "seed": n, "response_format": asked(schema), **parameters}
        for n, schema in enumerate(SCHEMAS)
    ]
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    file = client.files.create(
        file=("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()), purpose="batch"
    )
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    with Client(service.api_url) as ours:
        job = ours.submit(
            [{"messages": MESSAGES, **{k: v for k, v in body.items() if k != "model"}} for body in bodies]
        )
        single = [client.chat.completions.create(**body).choices[0] for body in bodies]
        answers = [(choice.message.content or "", choice.finish_reason) for choice in single]
        job.wait()
        ours.job(batch.id).wait()
        submitted = [(output.answer, output.choices[0].finish_reason) for output in job.outputs()]
        batched = [(output.answer, output.choices[0].finish_reason) for output in ours.job(batch.id).outputs()]
    assert submitted == batched == answers, "the text depends on the request alone"
    finished = [check(*answer, schema) for answer, schema in zip(answers, SCHEMAS, strict=True)]
    assert sum(finished) >= len(SCHEMAS) - 2, answers


def test_the_command_line_and_our_client_take_schemas_and_return_values(service: Service, tmp_path: Path) -> None:
    file, out = tmp_path / "city.json", tmp_path / "out.jsonl"
    file.write_text(json.dumps(City.model_json_schema()))
    done = service.basic(
        "submit", "-", "--schema", str(file), "--max-tokens", "300", "--output", str(out), stdin="Describe Bern.\n"
    )
    assert done.returncode == 0, done.stderr
    City.model_validate_json(json.loads(out.read_text())["choices"][0]["text"])
    with Client(service.api_url) as ours:
        job = ours.submit(["Describe Bern."], response_format=City, temperature=0, max_tokens=300)
        cut = ours.submit(["Describe Bern."], response_format=City, temperature=0, max_tokens=4)
        job.wait()
        cut.wait()
        assert isinstance(next(iter(job.outputs())).parsed, City)
        with pytest.raises(AnswerUnreadable, match="cut by max_tokens"):
            _ = next(iter(cut.outputs())).parsed
