"""Classes and schemas as the client takes them, and answers as values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, TypeAdapter

from jobs import Client
from jobs.client.response_format import response_format, schema_file
from jobs.errors import AnswerUnreadable, InvalidValue, RequestFailed


class City(BaseModel):
    name: str
    people: int


@dataclass
class Town:
    name: str
    people: int


PROPERTIES = {"name": {"title": "Name", "type": "string"}, "people": {"title": "People", "type": "integer"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}
TEXTS = ('{"name": "Bern", "people": 134000}', '{"name": "Ber', '{"name": "Bern"}')


@pytest.mark.parametrize("form", [City, Town, TypeAdapter(City)])
def test_a_class_becomes_the_schema_of_its_fields_and_of_no_others(form: Any) -> None:
    asked = response_format(form)
    schema = asked["json_schema"]["schema"]
    assert (asked["type"], asked["json_schema"]["strict"]) == ("json_schema", True)
    assert asked["json_schema"]["name"] == getattr(form, "__name__", "answer")
    assert (schema["properties"], schema["required"]) == (PROPERTIES, ["name", "people"])
    assert schema["additionalProperties"] is False


class Named(BaseModel):
    properties: City
    uniqueItems: bool


def test_fields_that_are_called_as_keywords_stay_fields() -> None:
    schema = response_format(Named)["json_schema"]["schema"]
    assert schema["properties"].keys() == {"properties", "uniqueItems"}
    assert (schema["additionalProperties"], schema["$defs"]["City"]["additionalProperties"]) == (False, False)


def test_a_set_takes_repeated_items_since_it_ignores_them() -> None:
    items = {"type": "array", "items": {"type": "string"}}
    assert response_format(set[str])["json_schema"]["schema"] == items
    assert response_format(items | {"uniqueItems": True})["json_schema"]["schema"]["uniqueItems"], "no class ignores it"


def test_an_object_is_a_schema_or_the_field_itself() -> None:
    assert response_format(SCHEMA)["json_schema"]["schema"] == SCHEMA
    assert response_format({"type": "json_object"}) == {"type": "json_object"}
    for form in ("City", 3, [City], object()):
        with pytest.raises(InvalidValue):
            response_format(form)


class Wire:
    """A service that keeps the submission and answers with three texts and a failure."""

    def __init__(self) -> None:
        self.submission = httpx.Request("GET", "http://none")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.submission = request
            return httpx.Response(200, json={"id": "batch_1"})
        lines = [
            {"custom_id": f"r{n}", "index": n, "status": "completed", "choices": [self._choice(n, text)]}
            for n, text in enumerate(TEXTS)
        ]
        lines.append({"custom_id": "r3", "index": 3, "status": "failed", "error": {"message": "No.", "code": "x"}})
        return httpx.Response(200, text="".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def _choice(n: int, text: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": ("stop", "length", "stop")[n], "completion_tokens": 9}


def test_outputs_have_values_of_the_class_and_say_why_one_has_none() -> None:
    wire = Wire()
    with Client("http://service", transport=httpx.MockTransport(wire)) as client:
        job = client.submit(["a", {"prompt": "b", "response_format": Town}], response_format=City)
        outputs = list(job.outputs())
        rows = job.results()
        plain = list(client.job(job.id).outputs())
    sent = json.loads(wire.submission.content)
    assert sent["response_format"] == response_format(City)
    assert sent["requests"][1]["response_format"] == response_format(Town)
    city = City(name="Bern", people=134000)
    assert (outputs[0].parsed, plain[0].parsed) == (city, {"name": "Bern", "people": 134000})
    assert [row["parsed"] for row in rows] == [city, None, None, None]
    for output, error, said in (
        (outputs[1], AnswerUnreadable, "cut by max_tokens"),
        (outputs[2], AnswerUnreadable, "Field required"),
        (outputs[3], RequestFailed, "No."),
    ):
        with pytest.raises(error, match=said):
            _ = output.parsed


def test_a_schema_that_is_too_long_for_the_address_precedes_the_lines_of_a_file(tmp_path: Path) -> None:
    path, long = tmp_path / "a.jsonl", {"type": "object", "description": "x" * 3_000}
    path.write_text('"Hello"\n')
    for schema in (SCHEMA, long):
        wire = Wire()
        with Client("http://service", transport=httpx.MockTransport(wire)) as client:
            client.submit(path, model="m", max_tokens=5, response_format=schema)
        *first, line = wire.submission.content.splitlines()
        query = dict(wire.submission.url.params)
        assert (line, query["model"]) == (b'"Hello"', "m")
        parameters = (
            json.loads(first[0])["parameters"] if first else {"response_format": json.loads(query["response_format"])}
        )
        assert parameters["response_format"] == response_format(schema)


def test_a_schema_file_is_json(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert schema_file(file) == response_format(SCHEMA)
    for content, said in (("{", "not JSON"), ("[]", "no JSON schema")):
        file.write_text(content)
        with pytest.raises(InvalidValue, match=said):
            schema_file(file)
