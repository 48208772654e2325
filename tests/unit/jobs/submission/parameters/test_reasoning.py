"""The fields that control the reasoning: every client's spelling means the same, and what has no meaning is refused."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import RequestRefused
from jobs.messages import CHAT_ENDPOINT, GenerationRequest
from jobs.submission.items import Item
from jobs.submission.parameters.reasoning import MAX_TEMPLATE_ARGUMENT_CHARS
from jobs.submission.parameters.sampling import parse_parameters
from jobs.submission.request_parser import Rules, parse_item


def stored(fields: dict[str, Any], job: dict[str, Any] | None = None) -> dict[str, Any]:
    rules = Rules("batch_1", "tiny", CHAT_ENDPOINT, parse_parameters(job or {}, CHAT_ENDPOINT), max_prompt_chars=1000)
    request = parse_item(Item(0, {"messages": [{"role": "user", "content": "Hello"}]} | fields), rules)
    assert request.failure is None, request.failure
    assert request.body is not None
    return dict(request.body)


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({"enable_thinking": False}, {"enabled": False}),
        ({"extra_body": {"enable_thinking": False}}, {"enabled": False}),
        ({"thinking": False}, {"enabled": False}),
        ({"thinking": {"type": "disabled"}}, {"enabled": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": None}}, {"enabled": True}),
        ({"reasoning": {"enabled": False}}, {"enabled": False}),
        ({"reasoning": {"effort": "none"}}, {"enabled": False, "effort": "none"}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"enabled": True, "effort": "high"}),
        ({"reasoning": {"exclude": True}}, {"included": False}),
        ({"reasoning_effort": "none"}, {"enabled": False, "effort": "none"}),
        ({"reasoning_effort": "low", "enable_thinking": False}, {"enabled": False, "effort": "low"}),
        ({"include_reasoning": False}, {"included": False}),
        ({"separate_reasoning": False}, {"separate": False}),
    ],
)
def test_every_spelling_of_a_wish_is_stored_the_same(fields: dict[str, Any], reasoning: dict[str, Any]) -> None:
    body = stored(fields)
    assert body["reasoning"] == reasoning
    assert stored({}, job=fields) == body, "a job's parameters hold for its requests"
    GenerationRequest.model_validate(body)


def test_a_request_that_asks_for_nothing_is_stored_as_before() -> None:
    idle = {"thinking": {}, "reasoning": {"effort": None}, "chat_template_kwargs": {}, "include_reasoning": True}
    assert stored(idle | {"enable_thinking": None, "separate_reasoning": True}) == stored({})
    assert not stored({}).keys() & {"reasoning", "chat_template_kwargs"}


def test_what_a_request_sets_wins_over_its_job_and_the_rest_stays() -> None:
    job = {"chat_template_kwargs": {"a": 1, "b": {"c": [1]}}, "reasoning_effort": "none", "include_reasoning": False}
    body = stored({"chat_template_kwargs": {"a": 2}, "reasoning_effort": "high"}, job)
    assert body["chat_template_kwargs"] == {"a": 2, "b": {"c": [1]}}
    assert body["reasoning"] == {"enabled": True, "effort": "high", "included": False}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt"),
        ({"chat_template_kwargs": {"bos_token": ""}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs.raise_exception"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs.__class__"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b"),
        ({"chat_template_kwargs": {"a": "x" * MAX_TEMPLATE_ARGUMENT_CHARS}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"a{n}": 1 for n in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": {"b": ["\0"]}}}, "chat_template_kwargs.a.b"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning": {"effort": ["low"]}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": 100}}, "reasoning.max_tokens"),
        ({"reasoning": {"effrt": "low"}}, "reasoning.effrt"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": 3}, "thinking"),
        ({"thinking_token_budget": 100}, "thinking_token_budget"),
        ({"include_reasoning": 1}, "include_reasoning"),
    ],
)
def test_what_can_not_be_honoured_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_parameters(fields, CHAT_ENDPOINT)
    assert refused.value.param == param


def test_the_reasoning_of_earlier_answers_is_kept_and_that_of_others_is_not() -> None:
    said = [
        {"role": "user", "content": "1+1?", "reasoning": "mine"},
        {"role": "assistant", "content": "2", "reasoning": "I add.", "reasoning_content": None},
        {"role": "assistant", "content": "2", "reasoning_content": "I add.", "reasoning": "the same"},
        {"role": "assistant", "content": "2", "reasoning": {"effort": "low"}},
    ]
    messages = stored({"messages": said})["messages"]
    assert [message.get("reasoning_content") for message in messages] == [None, "I add.", "I add.", None]


def test_parameters_that_the_model_may_recommend_are_stored_only_if_they_are_set() -> None:
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
    assert not stored({"temperature": None})["sampling"].keys() & names
    given = {"temperature": 1.0, "top_k": -1, "max_completion_tokens": 5}
    kept = stored(given)["sampling"]
    assert {name: kept[name] for name in names & kept.keys()} == {"temperature": 1.0, "top_k": 0, "max_tokens": 5}
    assert stored({}, job=given)["sampling"] == kept
