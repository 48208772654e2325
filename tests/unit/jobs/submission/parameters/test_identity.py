"""The identity of a request has all that decides its answer, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobs.messages import CHAT_ENDPOINT, RESPONSES_ENDPOINT, Endpoint
from jobs.submission.fields import Treatment
from jobs.submission.items import Item
from jobs.submission.request_parser import parse_item
from storage.records import NewRequest
from tests.unit.jobs.submission.test_fields import (
    ALONE,
    CHAT_ONLY,
    ENDPOINTS,
    HONOURED,
    PROMPTS,
    REPEATED,
    rows,
    rules,
)

# Fields that are no part of an answer, with values that are not idle.
NO_PART: dict[str, Any] = {
    "custom_id": "mine",
    "keep": {"row": 7},
    "timeout_s": 60,
    "user": "me",
    "stream": True,
    "cache": True,
    **{name: value for name, value in REPEATED.items() if name not in ("reasoning", "text")},
}
UNLIKE = {"seed": 4, "temperature": 0.5, "top_logprobs": 0}  # other values than those of the request


def read(fields: dict[str, Any], endpoint: Endpoint = CHAT_ENDPOINT, **changed: Any) -> NewRequest:
    """A request with a seed, or with these fields."""
    given: dict[str, Any] = {"cache": True, "owner": "key_1"} | changed
    parsed = parse_item(
        Item(0, {"temperature": 1.0, "seed": 3, **PROMPTS[endpoint], **fields}),
        replace(rules(endpoint), **given),
    )
    assert parsed.failure is None, parsed.failure
    return parsed


def identity(fields: dict[str, Any], endpoint: Endpoint = CHAT_ENDPOINT, **changed: Any) -> str | None:
    return read(fields, endpoint, **changed).identity


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_each_field_that_can_change_an_answer_changes_the_identity(endpoint: Endpoint) -> None:
    plain, found = identity({}, endpoint), {}
    assert plain is not None
    for field, _ in (row for row in rows() if row[1] == endpoint and row[0].treatment is Treatment.HONOURED):
        name = field.name
        theirs = name in CHAT_ONLY and endpoint not in field.endpoints
        if name in ALONE or name in NO_PART or theirs or (endpoint == RESPONSES_ENDPOINT and name in REPEATED):
            continue
        value = HONOURED.get(name, UNLIKE.get(name, 0.25 if field.type == "number" else 5))
        value = value.get(endpoint, value) if isinstance(value, dict) else value
        fields = {name: value}
        if name in ("do_sample", "sampling_seed"):  # other names of a field that the request has
            fields |= {"temperature": None, "seed": None if name == "sampling_seed" else 3}
        found[name] = identity(fields, endpoint)
    changed = {name: one for name, one in found.items() if name != "record_trees"}
    assert len(changed) > 30
    assert [name for name, one in changed.items() if one in (None, plain)] == []
    assert found["record_trees"] is None, "a copy has no trees"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_field_that_changes_no_answer_leaves_the_identity(endpoint: Endpoint) -> None:
    for name, value in NO_PART.items():
        if (name in REPEATED) <= (endpoint == RESPONSES_ENDPOINT):
            assert identity({name: value}, endpoint) == identity({}, endpoint), name


def test_owner_model_endpoint_and_prompt_change_the_identity() -> None:
    completion: Endpoint = "/v1/completions"
    found = [
        identity({}),
        identity({}, owner="key_2"),
        identity({}, model="other"),
        identity({}, RESPONSES_ENDPOINT),
        identity({}, completion),
        identity({"prompt": "Hello!"}, completion),
        identity({"messages": [{"role": "user", "content": "Hello!"}]}),
        identity({"messages": [{"role": "system", "content": "Hello"}, {"role": "user", "content": "Hello"}]}),
    ]
    assert None not in found
    assert len(set(found)) == len(found)


def test_the_order_in_which_a_template_shows_a_schema_changes_the_identity() -> None:
    def of(*names: str) -> str | None:
        parameters = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        return identity({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]})

    assert of("a", "b") == of("a", "b")
    assert of("a", "b") != of("b", "a")


def test_a_seed_counts_only_where_something_is_drawn() -> None:
    greedy = {"temperature": 0}
    assert identity(greedy) == identity({**greedy, "seed": 4}) == identity({**greedy, "seed": None})
    assert identity({}) != identity({"seed": 4})
    assert identity({"seed": None}) is None, "the service chooses another seed for each request"
    assert identity({"seed": None, "temperature": None}) is None, "a default temperature is the worker's"


def test_a_seed_by_identity_is_the_same_for_equal_requests_of_any_owner_and_job() -> None:
    asked = {"seed": "identity"}
    seeds = [read(asked), read(asked, owner="key_2"), read(asked, job_id="other"), read({**asked, "custom_id": "x"})]
    assert len({one.body["sampling"]["seed"] for one in seeds if one.body}) == 1
    assert identity(asked) == identity(asked, job_id="other") != identity(asked, owner="key_2")
    other = read({**asked, "top_p": 0.5}).body
    assert other is not None
    assert seeds[0].body is not None
    assert other["sampling"]["seed"] != seeds[0].body["sampling"]["seed"]


@pytest.mark.parametrize("seed", ["identities", "7", 1.5, True])
def test_another_word_or_number_is_no_seed(seed: Any) -> None:
    parsed = parse_item(Item(0, {"prompt": "Hello", "seed": seed}), rules(CHAT_ENDPOINT))
    assert parsed.failure is not None
    assert (parsed.failure.code, parsed.failure.param) == ("invalid_value", "seed")


@pytest.mark.parametrize(
    ("default", "own", "of_job", "reused"),
    [
        (True, None, None, True),
        (True, False, None, False),
        (True, None, False, False),
        (True, True, False, True),
        (False, None, None, False),
        (False, True, None, True),
        (False, None, True, True),
        (None, True, True, False),
    ],
)
def test_a_request_says_whether_it_may_be_answered_from_the_cache(
    default: bool | None, own: bool | None, of_job: bool | None, reused: bool
) -> None:
    defaults = {} if of_job is None else {"cache": of_job}
    assert (identity({"cache": own}, cache=default, defaults=defaults) is not None) is reused


def test_cache_is_true_or_false() -> None:
    parsed = parse_item(Item(0, {"prompt": "Hello", "cache": "no"}), rules(CHAT_ENDPOINT))
    assert parsed.failure is not None
    assert (parsed.failure.code, parsed.failure.param) == ("invalid_value", "cache")
