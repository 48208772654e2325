"""The fields that say what a text must be: each form of OpenAI, vLLM, SGLang, TGI and llama.cpp, and what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.errors import RequestRefused
from jobs.messages import CHAT_ENDPOINT, GenerationRequest, GrammarSpec
from jobs.submission.items import Item
from jobs.submission.parameters.grammar import read_grammar
from jobs.submission.request_parser import Rules, parse_item

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
HELD = GrammarSpec(kind="json_schema", value=TEXT)
OBJECT = GrammarSpec(kind="json_object")
REGEX = GrammarSpec(kind="regex", value="[ab]+")
CHOICE = GrammarSpec(kind="choice", value='["yes","no"]')
EBNF = GrammarSpec(kind="grammar", value='root ::= "a" | "b"')
CLOSED = GrammarSpec(
    kind="json_schema", value=json.dumps(SCHEMA | {"additionalProperties": False}, separators=(",", ":"))
)

FORMS: list[tuple[dict[str, Any], GrammarSpec | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, HELD),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, HELD),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"strict": True, "name": "x", "schema": SCHEMA}}},
        HELD,
    ),
    ({"response_format": {"type": "json_schema", "name": "x", "strict": None, "schema": SCHEMA}}, HELD),
    ({"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, HELD),
    ({"response_format": {"type": "json", "value": SCHEMA}}, HELD),
    ({"structured_outputs": {"json": SCHEMA}}, HELD),
    ({"structured_outputs": {"json": TEXT, "regex": None, "disable_any_whitespace": False, "_backend": "x"}}, HELD),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"structured_outputs": {"json_object": False}}, None),
    ({"structured_outputs": {"regex": "[ab]+"}}, REGEX),
    ({"structured_outputs": {"choice": ["yes", "no", "yes"]}}, CHOICE),
    ({"structured_outputs": {"grammar": EBNF.value}}, EBNF),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        HELD.model_copy(update={"whitespace": ""}),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ ]?"}},
        HELD.model_copy(update={"whitespace": "[ ]?"}),
    ),
    ({"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}}, CLOSED),
    ({"guided_json": SCHEMA}, HELD),
    ({"guided_json": TEXT, "guided_decoding_backend": "xgrammar"}, HELD),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, HELD.model_copy(update={"whitespace": " ?"})),
    ({"guided_json_object": True}, OBJECT),
    ({"guided_regex": "[ab]+"}, REGEX),
    ({"guided_choice": ["yes", "no"]}, CHOICE),
    ({"guided_grammar": EBNF.value}, EBNF),
    ({"json_schema": TEXT}, HELD),
    ({"regex": "[ab]+"}, REGEX),
    ({"ebnf": EBNF.value}, EBNF),
    ({"grammar": {"type": "json", "value": SCHEMA}}, HELD),
    ({"grammar": {"type": "regex", "value": "[ab]+"}}, REGEX),
    ({"grammar": EBNF.value}, EBNF),
    ({"guided_regex": "[ab]+", "regex": "[ab]+"}, REGEX),
]

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {"schema": {}}}, "response_format.type", "text, json_object, json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format.json_schema", "a list"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "shema": {}}}},
        "response_format.json_schema.shema",
        "did you mean schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": 3, "schema": {}}}},
        "response_format.json_schema.name",
        "string",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"strict": "yes", "schema": {}}}},
        "response_format.json_schema.strict",
        "true or false",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "tools"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "json and regex contradict"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "JSON only"),
    (
        {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
        "JSON only",
    ),
    ({"structured_outputs": {"jason": {}}}, "structured_outputs.jason", "did you mean json"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "tools"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": 3}, "guided_json", "a number"),
    ({"guided_json": {}, "guided_whitespace_pattern": "a"}, "guided_json.whitespace_pattern", "white space of JSON"),
    ({"guided_choice": "yes"}, "guided_choice", "list"),
    ({"guided_choice": ["yes", 1]}, "guided_choice", "list"),
    ({"guided_choice": ["a", *map(str, range(1000))]}, "guided_choice", "at most 1000"),
    ({"guided_json_object": "yes"}, "guided_json_object", "true or false"),
    ({"guided_regex": "(a"}, "guided_regex", "character 3"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "reference"),
    ({"guided_grammar": "start: a"}, "guided_grammar", "not valid"),
    ({"guided_grammar": 'start: <think> "a"'}, "guided_grammar", "Special tokens"),
    ({"guided_grammar": 'start: a\na[stop="x"]: /.*/'}, "guided_grammar", "Options of rules"),
    ({"guided_grammar": 'start: %json {"type": "object"}'}, "guided_grammar", "response_format"),
    ({"ebnf": 'root ::= "a'}, "ebnf", "not valid"),
    ({"grammar": {"type": "xml", "value": ""}}, "grammar.type", "json_schema, regex"),
    ({"grammar": {"type": "regex"}}, "grammar.value", "missing"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "both say"),
]


@pytest.mark.parametrize(("fields", "spec"), FORMS, ids=[json.dumps(fields)[:60] for fields, _ in FORMS])
def test_each_form_of_a_grammar_is_read(fields: dict[str, Any], spec: GrammarSpec | None) -> None:
    assert read_grammar(fields, CHAT_ENDPOINT) == spec


@pytest.mark.parametrize(("fields", "param", "said"), WRONG, ids=[json.dumps(each[0])[:60] for each in WRONG])
def test_what_is_wrong_with_a_grammar_is_said_with_its_field(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_grammar(fields, CHAT_ENDPOINT)
    assert refused.value.param == param
    assert said in refused.value.message


def request(fields: dict[str, Any], grammar: GrammarSpec | None = None) -> Any:
    rules = Rules("batch_1", "tiny", CHAT_ENDPOINT, {}, max_prompt_chars=1000, grammar=grammar)
    return parse_item(Item(4, {"prompt": "Hello", **fields}, line=5), rules)


def test_a_line_overrides_the_grammar_of_its_job_and_text_asks_for_none() -> None:
    found = [request(fields, OBJECT).body.get("grammar") for fields in ({}, {"regex": "[ab]+"})]
    assert found == [{"kind": "json_object", "value": ""}, {"kind": "regex", "value": "[ab]+"}]
    assert "grammar" not in request({"response_format": {"type": "text"}}, OBJECT).body
    assert "grammar" not in request({}).body, "a request without one is stored as before"


def test_a_bad_schema_fails_its_own_line_and_names_keyword_and_place() -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    failure = request({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}).failure
    place = "response_format.json_schema.schema.properties.tags.uniqueItems"
    assert (failure.code, failure.param) == ("unsupported_parameter", place)
    assert failure.message.startswith(f"line 5, {place}: ")


def test_the_order_of_the_keys_of_a_schema_is_kept_in_storage() -> None:
    stored = GenerationRequest.model_validate(request({"guided_json": SCHEMA}).body)
    assert stored.grammar is not None
    assert list(json.loads(stored.grammar.value)["properties"]) == ["b", "a"]
