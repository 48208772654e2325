"""Each field of the table, on all endpoints and at every door: lines, jobs and single calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest

from jobs.errors import RequestRefused
from jobs.messages import CHAT_ENDPOINT, RESPONSES_ENDPOINT, Endpoint, GenerationRequest
from jobs.submission.fields import FIELDS, MESSAGE_FIELDS, Field, Treatment, field_of
from jobs.submission.items import Item
from jobs.submission.parameters.grammar import read_grammar
from jobs.submission.parameters.sampling import parameter_fields, parse_parameters
from jobs.submission.request_parser import Rules, parse_body, parse_item
from storage.records import NewRequest

ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
ANYTHING: tuple[Any, ...] = (True, 7, 0.5, "text", ["text"], {"a": 1})
PROMPTS: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    RESPONSES_ENDPOINT: {"input": "Hello"},
}


def rules(endpoint: Endpoint) -> Rules:
    return Rules("batch_1", "tiny", endpoint, {}, max_prompt_chars=1000)


def job_rules(endpoint: Endpoint, fields: dict[str, Any]) -> Rules:
    """The rules of a job with these parameters."""
    grammar = read_grammar(parameter_fields(fields, endpoint), endpoint)
    return replace(rules(endpoint), defaults=parse_parameters(fields, endpoint), grammar=grammar)


def stored(body: Any) -> Any:
    """A stored request, with its unset fields, without what a Response object repeats."""
    return GenerationRequest.model_validate(body).model_dump(exclude={"response"})


def read_at_every_door(endpoint: Endpoint, fields: dict[str, Any]) -> list[Any]:
    """Return what a job's request, a batch line, a single call, a job and an `extra_body` make of the fields.

    A refusal is its error code and field.
    """
    body = {"model": "tiny", **PROMPTS[endpoint], **fields}
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    nested = {"model": "tiny", **PROMPTS[endpoint], "extra_body": fields}
    found: list[Any] = []
    for value in (body, line, {"custom_id": "a", "body": body}, nested):
        request = parse_item(Item(0, value), rules(endpoint))
        failure = request.failure
        found.append(stored(request.body) if failure is None else (failure.code, failure.param))
    readers: list[Callable[[], NewRequest]] = [
        lambda: parse_body(body, rules(endpoint)),
        lambda: parse_item(Item(0, PROMPTS[endpoint]), job_rules(endpoint, fields)),
    ]
    for read in readers:
        try:
            found.append(stored(read().body))
        except RequestRefused as refused:
            found.append((refused.code, refused.param))
    return found


def rows() -> list[tuple[Field, Endpoint]]:
    return [
        (field_of(name, endpoint), endpoint) for name in dict.fromkeys(f.name for f in FIELDS) for endpoint in ENDPOINTS
    ]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_value_that_asks_for_nothing_gives_the_request_without_the_field(endpoint: Endpoint) -> None:
    plain = read_at_every_door(endpoint, {})
    assert all(isinstance(each, dict) for each in plain)
    for field, _ in (row for row in rows() if row[1] == endpoint):
        for idle in (None, *field.idle):
            assert read_at_every_door(endpoint, {field.name: idle}) == plain, (field.name, idle)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_dropped_field_changes_nothing_whatever_its_value(endpoint: Endpoint) -> None:
    plain = read_at_every_door(endpoint, {})
    for field, _ in (row for row in rows() if row[1] == endpoint and row[0].treatment is Treatment.DROPPED):
        for value in ANYTHING:
            assert read_at_every_door(endpoint, {field.name: value}) == plain, (field.name, value)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_refused_field_that_asks_for_something_is_refused_by_name_with_the_reason(endpoint: Endpoint) -> None:
    for field, _ in (row for row in rows() if row[1] == endpoint and row[0].treatment is Treatment.REFUSED):
        value = next(each for each in ANYTHING if not field.is_idle(each))
        assert set(read_at_every_door(endpoint, {field.name: value})) == {("unsupported_parameter", field.name)}
        failure = parse_item(Item(0, PROMPTS[endpoint] | {field.name: value}), rules(endpoint)).failure
        assert failure is not None
        assert field.meaning in failure.message


HONOURED: dict[str, Any] = {
    "extra_body": {"top_k": 3},
    "logit_bias": {"1": 2},
    "stop": "x",
    "stop_token_ids": [3],
    "ignore_eos": True,
    "logprobs": {"/v1/chat/completions": True, "/v1/completions": 2, RESPONSES_ENDPOINT: True},
    "include": {RESPONSES_ENDPOINT: ["message.output_text.logprobs"]},
    "truncation": "auto",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "[ab]+"},
    "guided_json": {"type": "array"},
    "guided_json_object": True,
    "guided_regex": "[ab]+",
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "a" | "b"',
    "json_schema": '{"type": "array"}',
    "regex": "[ab]+",
    "ebnf": 'root ::= "a" | "b"',
    "grammar": {"type": "regex", "value": "[ab]+"},
    "chat_template_kwargs": {"a": [1]},
    "enable_thinking": False,
    "thinking": {"type": "disabled"},
    "reasoning": {"effort": "low"},
    "reasoning_effort": "none",
    "include_reasoning": False,
    "separate_reasoning": False,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "continue_final_message": True,
    "add_generation_prompt": False,
    "add_special_tokens": {"/v1/chat/completions": True, "/v1/completions": False, "/v1/responses": True},
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "no_stop_trim": True,
    "echo": True,
    "return_full_text": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "truncation_side": "right",
    "do_sample": False,
}
CHAT_ONLY = frozenset(list(HONOURED)[list(HONOURED).index("chat_template_kwargs") :])
# Fields that the Response object repeats, beside what they may ask for.
REPEATED: dict[str, Any] = {
    "text": {"verbosity": "low"},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
    "background": True,
    "store": False,
}
ALONE = {  # they mean nothing without other fields
    "top_logprobs": 0,
    "guided_whitespace_pattern": " ?",
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "cache": False,  # of the request's identity, not of the request
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_honoured_field_changes_the_stored_request(endpoint: Endpoint) -> None:
    plain = read_at_every_door(endpoint, {})
    for field, _ in (row for row in rows() if row[1] == endpoint and row[0].treatment is Treatment.HONOURED):
        if endpoint == RESPONSES_ENDPOINT and field.name in REPEATED.keys() - {"reasoning"}:
            continue
        if field.name in ALONE:
            assert read_at_every_door(endpoint, {field.name: ALONE[field.name]}) == plain
            continue
        value = HONOURED.get(field.name, 0.25 if field.type == "number" else 3)
        value = value.get(endpoint, value) if isinstance(value, dict) else value
        found = read_at_every_door(endpoint, {field.name: value})
        if field.name in CHAT_ONLY and endpoint not in field.endpoints:
            assert set(found) == {("unsupported_parameter", field.name)}, "raw prompts have no template"
            continue
        assert all(isinstance(each, dict) for each in found), (field.name, found)
        assert all(each != without for each, without in zip(found, plain, strict=True)), field.name


def test_a_response_repeats_what_it_was_asked() -> None:
    def options(fields: dict[str, Any]) -> Any:
        return parse_body({"model": "tiny", "input": "Hello", **fields}, rules(RESPONSES_ENDPOINT)).body["response"]  # type: ignore[index]

    assert options({}) == {}
    for name, value in REPEATED.items():
        told = options({name: value})
        assert told in ({name: value}, {"echo": {name: value}}), name


def test_values_are_idle_as_json_values_not_as_python_objects() -> None:
    length_penalty, watermark, priority = (
        field_of(name, CHAT_ENDPOINT) for name in ("length_penalty", "watermark", "priority")
    )
    assert length_penalty.is_idle(1)
    assert length_penalty.is_idle(1.0)
    assert not length_penalty.is_idle(True)
    assert not watermark.is_idle(0)
    assert not priority.is_idle(False)
    formats = field_of("response_format", CHAT_ENDPOINT)
    assert formats.is_idle({"type": "text", "json_schema": None})
    assert not formats.is_idle({"type": "json_object"})


def test_every_row_says_what_it_means_and_no_name_has_two_rows_for_one_endpoint() -> None:
    assert [field.name for field in (*FIELDS, *MESSAGE_FIELDS) if not field.meaning or not field.type] == []
    named = [(field.name, endpoint) for field in FIELDS for endpoint in field.endpoints]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1, "length_penalty": 1.0, "use_beam_search": False, "priority": 0, "extra_body": {}},
        {"best_of": 2, "n": 2},
        {"extra_body": {"extra_body": {"min_p": None}, "top_k": None}},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "functions": None},
        {"add_generation_prompt": True, "continue_final_message": False, "spaces_between_special_tokens": False},
        {"max_tokens": 7, "max_new_tokens": 7, "do_sample": False, "temperature": 0, "stop": ["x"] * 16},
    ],
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_bodies_that_other_engines_take_are_taken(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    if endpoint == RESPONSES_ENDPOINT:
        fields = {name: 1 if name in ("n", "best_of") else value for name, value in fields.items()}
    assert all(isinstance(each, dict) for each in read_at_every_door(endpoint, fields)), fields


@pytest.mark.parametrize(
    ("other", "name", "value"),
    [
        ("max_new_tokens", "max_tokens", 7),
        ("min_new_tokens", "min_tokens", 7),
        ("sampling_seed", "seed", 7),
        ("truncate", "truncate_prompt_tokens", 7),
        ("no_stop_trim", "include_stop_str_in_output", True),
    ],
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_synonym_is_its_parameter_and_contradicts_another_value_of_it(
    endpoint: Endpoint, other: str, name: str, value: Any
) -> None:
    assert read_at_every_door(endpoint, {other: value}) == read_at_every_door(endpoint, {name: value})
    assert read_at_every_door(endpoint, {other: value, name: value}) == read_at_every_door(endpoint, {name: value})
    contradicting = {name: value, other: False if value is True else value - 1}
    assert set(read_at_every_door(endpoint, contradicting)) == {("invalid_value", other)}
    assert set(read_at_every_door(endpoint, {other: "seven"})) == {("invalid_value", other)}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_do_sample_false_is_temperature_0_and_contradicts_another(endpoint: Endpoint) -> None:
    greedy = read_at_every_door(endpoint, {"temperature": 0.0})
    assert read_at_every_door(endpoint, {"do_sample": False}) == greedy
    contradicting = {"temperature": 0.7, "do_sample": False}
    assert set(read_at_every_door(endpoint, contradicting)) == {("invalid_value", "do_sample")}
    assert set(read_at_every_door(endpoint, {"do_sample": 0})) == {("invalid_value", "do_sample")}
