from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.errors import InvalidJsonLine
from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, Endpoint, GenerationRequest
from jobs.submission.input_lines import find_custom_id
from jobs.submission.items import MAX_JSON_NODES, Item, read_lines
from jobs.submission.parameters.sampling import parse_parameters
from jobs.submission.request_parser import Rules, parse_item
from storage.records import NewRequest, RequestFailure


def lines(body: bytes, max_line_bytes: int = 1_000_000) -> Iterator[Item]:
    return read_lines(io.BytesIO(body), max_line_bytes)


def some_rules(
    endpoint: Endpoint = CHAT_ENDPOINT, context_tokens: int | None = None, job_id: str = "batch_1", **defaults: Any
) -> Rules:
    return Rules(job_id, "tiny", endpoint, defaults, max_prompt_chars=1000, context_tokens=context_tokens)


def parsed(value: Any, rules: Rules | None = None, index: int = 0, line: int | None = None) -> NewRequest:
    return parse_item(Item(index, value, line), rules or some_rules())


def accepted(value: Any, rules: Rules | None = None, index: int = 0) -> GenerationRequest:
    request = parsed(value, rules, index)
    assert request.failure is None, request.failure
    return GenerationRequest.model_validate(request.body)


def refused(value: Any, rules: Rules | None = None, line: int | None = None) -> RequestFailure:
    request = parsed(value, rules, line=line)
    assert request.body is None
    assert request.failure is not None
    return request.failure


@pytest.mark.parametrize(
    "value",
    [
        "Hello",
        {"prompt": "Hello"},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]},
        {"custom_id": "a", "method": "POST", "url": CHAT_ENDPOINT, "body": {"prompt": "Hello", "model": "tiny"}},
        {"prompt": "Hello", "stop": None, "max_tokens": None},
    ],
)
def test_every_form_of_an_item_is_the_same_request(value: Any) -> None:
    request = accepted(value)
    turns = [(message.role, message.content) for message in request.messages or ()]
    assert (turns, request.prompt) in (([("user", "Hello")], None), ([], "Hello"))


def test_the_completions_endpoint_sends_the_raw_prompt_and_writes_16_tokens_by_default() -> None:
    request = accepted("Hello", some_rules(COMPLETIONS_ENDPOINT))
    assert request.prompt == "Hello"
    assert request.messages is None
    assert request.sampling.max_tokens == 16


def test_the_role_developer_is_read_as_system() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    request = accepted({"messages": messages})
    assert request.messages is not None
    assert request.messages[0].role == "system"


def test_parameters_of_a_request_override_those_of_the_job() -> None:
    request = accepted({"prompt": "Hello", "temperature": 0.5}, some_rules(temperature=0, max_tokens=7))
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.5, 7)


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    assert accepted({"prompt": "Hello", "max_tokens": 5, "max_completion_tokens": 9}).sampling.max_tokens == 9


def test_a_default_seed_follows_from_job_and_index_so_that_a_restart_writes_the_same_text() -> None:
    seeds = [accepted("Hello", index=index).sampling.seed for index in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert accepted("Hello", some_rules(job_id="batch_2")).sampling.seed != seeds[0]


def test_a_custom_id_is_kept_and_a_missing_one_is_generated_from_the_index() -> None:
    assert parsed({"custom_id": "Ünï", "prompt": "Hello"}).custom_id == "Ünï"
    assert parsed({"id": "mine", "prompt": "Hello"}).custom_id == "mine"
    assert parsed({"custom_id": 7, "prompt": "Hello"}).custom_id == "7"
    assert parsed("Hello", index=3).custom_id == "request-3"


def test_stops_and_biases_are_stored_as_a_worker_reads_them() -> None:
    given = {"stop": "\n", "stop_token_ids": [5, 6], "logit_bias": {"1": 5, "2": -0.5}, "repetition_penalty": 1.2}
    sampling = accepted({"prompt": "Hello", **given}).sampling
    assert (sampling.stop, sampling.stop_token_ids) == (("\n",), (5, 6))
    assert (sampling.logit_bias, sampling.repetition_penalty) == ({1: 5.0, 2: -0.5}, 1.2)
    assert accepted({"prompt": "Hello", "stop": ["a", "b"], "logit_bias": {}}).sampling.stop == ("a", "b")


@pytest.mark.parametrize(
    ("endpoint", "given", "wanted"),
    [
        (CHAT_ENDPOINT, {}, None),
        (CHAT_ENDPOINT, {"logprobs": False, "top_logprobs": 0}, None),
        (CHAT_ENDPOINT, {"logprobs": True}, 0),
        (CHAT_ENDPOINT, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETIONS_ENDPOINT, {"logprobs": 0}, 0),
        (COMPLETIONS_ENDPOINT, {"logprobs": 5}, 5),
        (COMPLETIONS_ENDPOINT, {"logprobs": None}, None),
    ],
)
def test_each_endpoint_has_its_own_fields_for_logprobs(
    endpoint: Endpoint, given: dict[str, Any], wanted: int | None
) -> None:
    assert accepted({"prompt": "Hello", **given}, some_rules(endpoint)).sampling.logprobs == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, 3),
        ({"top_logprobs": 7}, 7),
        ({"top_logprobs": 0}, 0),
        ({"logprobs": True}, 3),
        ({"logprobs": False}, None),
    ],
)
def test_a_request_may_ask_for_other_logprobs_than_its_job(given: dict[str, Any], wanted: int | None) -> None:
    defaults = parse_parameters({"logprobs": True, "top_logprobs": 3}, CHAT_ENDPOINT)
    assert accepted({"prompt": "Hello", **given}, some_rules(**defaults)).sampling.logprobs == wanted


@pytest.mark.parametrize(
    ("endpoint", "given", "param"),
    [
        (CHAT_ENDPOINT, {"logprobs": 1}, "logprobs"),
        (CHAT_ENDPOINT, {"logprobs": 0}, "logprobs"),
        (CHAT_ENDPOINT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT_ENDPOINT, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        (CHAT_ENDPOINT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT_ENDPOINT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT_ENDPOINT, {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        (COMPLETIONS_ENDPOINT, {"logprobs": True}, "logprobs"),
        (COMPLETIONS_ENDPOINT, {"logprobs": 6}, "logprobs"),
        (COMPLETIONS_ENDPOINT, {"logprobs": 2.0}, "logprobs"),
        (COMPLETIONS_ENDPOINT, {"logprobs": 2, "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_logprobs_out_of_range_or_with_fields_of_the_other_endpoint_are_refused(
    endpoint: Endpoint, given: dict[str, Any], param: str
) -> None:
    failure = refused({"prompt": "Hello", **given}, some_rules(endpoint))
    assert (failure.code, failure.param, failure.status_code) == ("invalid_value", param, 400)


def test_a_misspelt_field_is_refused_with_the_right_spelling() -> None:
    failure = refused({"prompt": "Hello", "max_token": 5})
    assert failure.code == "unknown_parameter"
    assert "did you mean max_tokens?" in failure.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", True),
        ("max_tokens", "7"),
        ("max_tokens", 7.5),
        ("temperature", -1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("n", 0),
        ("n", 10**6),
        ("seed", 2**64),
        ("top_k", -2),
        ("min_p", 2),
        ("ignore_eos", 1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.5),
        ("repetition_penalty", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "5"}),
        ("logit_bias", {"-1": 5}),
        ("logit_bias", {"one": 5}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("stop", 7),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", ["a", 7]),
        ("stop", "x" * 1001),
        ("stop", "a\0b"),
        ("stop_token_ids", 7),
        ("stop_token_ids", ["7"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(65))),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "middle"),
        ("skip_special_tokens", "no"),
        ("echo", 1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("return_token_ids", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_naming_line_and_field(field: str, value: Any) -> None:
    failure = refused({"prompt": "Hello", field: value}, line=3)
    assert (failure.code, failure.param) == ("invalid_value", field)
    assert failure.message.startswith(f"line 3, {field}: must be")


USER, PREFIX = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "prefix": True}


def test_a_prefix_is_a_message_to_continue() -> None:
    request = accepted({"messages": [USER, PREFIX]})
    assert request.sampling.continue_final_message
    assert not accepted({"messages": [USER, PREFIX | {"prefix": False}]}).sampling.continue_final_message
    assert accepted({"messages": [USER, PREFIX], "add_generation_prompt": False}).sampling.continue_final_message


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"messages": [PREFIX, USER]}, "messages[0].prefix"),
        ({"messages": [USER | {"prefix": True}]}, "messages[0].prefix"),
        ({"messages": [USER, PREFIX | {"prefix": 1}]}, "messages[1].prefix"),
        ({"messages": [USER, PREFIX], "add_generation_prompt": True}, "continue_final_message"),
        (
            {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"prompt": "Hello", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "Hello", "min_tokens": 8, "max_tokens": 7}, "min_tokens"),
        ({"prompt": "Hello", "max_tokens": 0, "logprobs": True}, "max_tokens"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused_by_name(value: Any, param: str) -> None:
    failure = refused(value)
    assert (failure.code, failure.param) == ("invalid_value", param)


def test_min_tokens_beyond_the_default_of_completions_is_refused() -> None:
    assert refused({"prompt": "Hello", "min_tokens": 17}, some_rules(COMPLETIONS_ENDPOINT)).param == "min_tokens"
    assert accepted({"prompt": "Hello", "min_tokens": 16}, some_rules(COMPLETIONS_ENDPOINT)).sampling.min_tokens == 16


@pytest.mark.parametrize("asked", [{"echo": True}, {"prompt_logprobs": 0}])
@pytest.mark.parametrize("endpoint", [CHAT_ENDPOINT, COMPLETIONS_ENDPOINT])
def test_an_answer_without_tokens_must_ask_for_something_of_its_prompt(endpoint: Endpoint, asked: Any) -> None:
    assert accepted({"prompt": "Hello", "max_tokens": 0, **asked}, some_rules(endpoint)).sampling.max_tokens == 0


def test_a_job_that_begins_answers_contradicts_a_request_that_continues_a_message() -> None:
    rules = some_rules(add_generation_prompt=True)
    assert refused({"messages": [USER, PREFIX]}, rules).param == "continue_final_message"


def test_parameters_at_their_defaults_are_left_out_of_what_is_stored() -> None:
    request = parsed({"prompt": "Hello", "min_tokens": 0, "skip_special_tokens": True, "truncation_side": "left"})
    assert request.body is not None
    assert request.body == parsed("Hello").body


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "prompt"),
        (" \n", "prompt"),
        ("a\0b", "prompt"),
        ("\ud800", "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "Hello", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]}, "messages"),
        ({}, "prompt"),
        (7, None),
        ({"prompt": "Hello", "custom_id": 7.5}, "custom_id"),
        ({"prompt": "Hello", "custom_id": 10**64}, "custom_id"),
        ({"prompt": "Hello", "keep": ["label"]}, "keep"),
        ({"prompt": "Hello", "keep": {"label": "x" * 20_000}}, "keep"),
        ({"prompt": "Hello", "keep": {"label": "\0"}}, "keep"),
        (
            {
                "prompt": "Hello",
                "keep": dict.fromkeys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-+.", 1),
            },
            "keep",
        ),
        ({"prompt": "Hello", "custom_id": "x" * 65}, "custom_id"),
        ({"prompt": "Hello", "model": "other"}, "model"),
        ({"url": CHAT_ENDPOINT}, "body"),
        ({"url": "/v1/embeddings", "body": {"prompt": "Hello"}}, "url"),
        ({"method": "GET", "body": {"prompt": "Hello"}}, "method"),
    ],
)
def test_a_bad_prompt_is_refused_naming_its_location(value: Any, param: str | None) -> None:
    failure = refused(value)
    assert failure.param == param
    assert failure.message.startswith("requests[0]")


def test_a_prompt_with_too_many_characters_is_refused_before_it_is_tokenized() -> None:
    assert refused("x" * 1001).code == "context_length_exceeded"


@pytest.mark.parametrize("cap", [64, 65, 10**12])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("endpoint", [CHAT_ENDPOINT, COMPLETIONS_ENDPOINT])
def test_max_tokens_beyond_the_context_are_accepted_and_count_as_the_rest_of_it(
    endpoint: Endpoint, name: str, cap: int
) -> None:
    rules = some_rules(endpoint, context_tokens=64)
    request = parsed({"prompt": "Hello", name: cap}, rules)
    assert request.failure is None
    assert request.tokens == 64, "quotas count what the worker can generate at most"
    assert (
        parsed("Hello", some_rules(endpoint, context_tokens=64, **parse_parameters({name: cap}, endpoint))).tokens == 64
    )


def test_lines_end_at_newlines_only_and_blank_ones_do_not_count() -> None:
    items = list(lines('\ufeff"one"\r\n\n{"prompt": "t\u2028wo"}\n'.encode()))
    assert [(item.index, item.line, item.value) for item in items] == [(0, 1, "one"), (1, 3, {"prompt": "t\u2028wo"})]


@pytest.mark.parametrize(("length", "refused"), [(100, False), (101, True), (1_000_000, True)])
def test_a_line_that_is_too_long_is_passed_over(length: int, refused: bool) -> None:
    long = b'"' + b"x" * (length - 2) + b'"'
    first, middle, last = lines(b'"one"\n' + long + b'\n"three"', max_line_bytes=100)
    assert (first.value, last.value, [item.line for item in (first, middle, last)]) == ("one", "three", [1, 2, 3])
    request = parse_item(middle, some_rules())
    assert (request.failure is not None) is refused
    assert request.failure is None or "line 2: The line has more than 100 bytes" in request.failure.message


@pytest.mark.parametrize(
    "line",
    [b"{", b"nonsense", b'{"temperature": NaN}', b'"\\ud800"', b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b'"\xe9"'],
)
def test_a_line_that_is_not_json_fails_alone_with_its_number(line: bytes) -> None:
    first, bad, last = (parse_item(item, some_rules()) for item in lines(b'"one"\n' + line + b'\n"three"'))
    assert first.failure is last.failure is None
    assert bad.failure is not None
    assert bad.failure.code == "invalid_json_line"
    assert bad.failure.message.startswith("line 2: ")
    assert len(bad.failure.message) < 200


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"}\xef\xbb\xbf{"prompt": "b"}', "a byte order mark inside the line: files were joined"),
        (b'{"prompt": "a"}\x1a{"prompt": "b"}', "Ctrl-Z, the end mark of old files, inside the line"),
        (b'{"prompt": "a"}{"prompt": "b"}', "two requests on one line"),
        (b'{"prompt": "a"},', "ends with a comma"),
        ('{"prompt": "a"}'.encode("utf-16"), "it is UTF-16; save the whole file as UTF-8"),
        (b'{"prompt": "caf\xe9"}', "it is not UTF-8"),
    ],
)
def test_what_a_line_holds_besides_a_request_is_named(line: bytes, said: str) -> None:
    _, bad, _ = (parse_item(item, some_rules()) for item in lines(b'"one"\n' + line + b'\n"three"'))
    assert bad.failure is not None
    assert said in bad.failure.message


@pytest.mark.parametrize(
    "content", [b'[\n"a",\n"b"\n]', b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', b'{\n"prompt": "a"\n}']
)
def test_one_json_value_on_several_lines_is_named_though_one_of_them_is_a_value(content: bytes) -> None:
    with pytest.raises(InvalidJsonLine, match="one value on several lines"):
        list(lines(content))


@pytest.mark.parametrize(
    "value",
    [
        {"custom_id": "a", "surprise": 1},
        {"custom_id": "a", "prompt": 7},
        {"custom_id": "a", "body": {"prompt": "Hello"}, "metadata": {"row": "7"}},
        {"custom_id": "a", "body": {"prompt": "Hello"}, "method": "GET"},
        {"custom_id": "a", "body": {"prompt": "Hello"}, "url": "/v1/embeddings"},
        {"custom_id": "a", "body": None, "url": CHAT_ENDPOINT},
        {"custom_id": "a", "body": []},
        {"custom_id": None, "id": "a", "body": {}, "priority": 1},
        {"body": {"custom_id": "a"}, "priority": 1},
    ],
)
def test_a_given_id_survives_whatever_else_is_wrong(value: Any) -> None:
    request = parsed(value)
    assert request.failure is not None
    assert request.custom_id == "a"


@pytest.mark.parametrize("line", [b'{"custom_id": "a", "x": NaN}', b'{"x": "\xe9", "custom_id": "a"}', b'{"id": "a",}'])
def test_an_unreadable_line_keeps_its_id(line: bytes) -> None:
    (item,) = lines(line)
    assert parse_item(item, some_rules()).custom_id == "a"


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b\x08\x00", b'[{"prompt": "a"}]', b'{\n "prompt": "a"\n}', b"id,prompt\n1,hi\n2,yo\n"]
)
def test_a_file_of_another_format_is_refused_as_a_whole_by_name(content: bytes) -> None:
    with pytest.raises(InvalidJsonLine, match=r"The file is"):
        list(lines(content))


@pytest.mark.parametrize(
    "line", [b'"' + b'\\"' * 500_000, b"{" * 900_000, b'{"' * 450_000, b'{"custom_id" ' * 80_000, b"'" * 900_000]
)
def test_an_invalid_line_is_searched_once(line: bytes) -> None:
    """The search for an id is linear, even where a backtracking search would take hours."""
    assert find_custom_id(line) is None


def test_a_bug_fails_only_the_request_that_hits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.submission.request_parser.token_bounds", fail)
        request = parsed({"custom_id": "a", "prompt": "Hello"})
    assert request.failure is not None
    assert (request.custom_id, request.failure.code, request.failure.status_code) == ("a", "server_error", 500)
    accepted("Hello")


def test_an_answer_sent_back_as_history_is_accepted() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "The Nile.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning_content": "",
        "provider_specific_fields": {},
    }
    messages = [{"role": "user", "content": "Name a river."}, answer, {"role": "user", "content": "Another."}]
    request = accepted({"messages": messages})
    assert [message.content for message in request.messages or ()] == ["Name a river.", "The Nile.", "Another."]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "assistant", "content": "Hi", "annotations": [{"type": "url_citation"}]}, "Hi"),
        (
            {"role": "assistant", "content": "Hi", "reasoning_content": "Hm.", "thinking_blocks": [{"thinking": "Hm"}]},
            "Hi",
        ),
        (
            {
                "role": "assistant",
                "content": "Hi",
                "id": "msg_1",
                "finish_reason": "stop",
                "timestamp": 1,
                "x": {"y": 2},
            },
            "Hi",
        ),
        (
            {
                "role": "user",
                "content": "Hi",
                "cache_control": {"type": "ephemeral"},
                "tool_calls": [],
                "prefix": False,
            },
            "Hi",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}, "Hi"),
        ({"role": "user", "content": ["Hi", {"text": " you"}]}, "Hi you"),
        ({"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, "Hi"),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Hm"}, {"type": "output_text", "text": "Hi"}],
            },
            "Hi",
        ),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "user", "content": ""}, ""),
        ({"role": "user", "content": "  "}, "  "),
        ({"role": "user", "content": []}, ""),
        ({"role": "system", "content": None}, ""),
        ({"role": "developer", "content": None}, ""),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
    ],
)
def test_a_message_keeps_its_text_whatever_fields_an_answer_added(message: dict[str, Any], wanted: str) -> None:
    request = accepted({"messages": [message, {"role": "user", "content": "Go on."}]})
    assert [message.content for message in request.messages or ()] == [wanted, "Go on."]


def test_a_field_of_a_message_that_would_change_the_text_is_refused_by_name() -> None:
    for name, value in {
        "function_call": {"name": "f"},
        "audio": {"id": "a"},
    }.items():
        failure = refused({"messages": [{"role": "assistant", "content": "Hi", name: value}]})
        assert (failure.code, failure.param) == ("unsupported_parameter", f"messages[0].{name}")
        assert "not supported" in failure.message or "Prompts are text" in failure.message


def test_a_line_with_too_many_lists_is_refused_before_it_is_parsed() -> None:
    (item,) = lines(b"[" * (MAX_JSON_NODES + 1), max_line_bytes=10_000_000)
    assert "lists and objects" in refused(item.value, line=1).message


def test_the_error_of_an_invalid_line_does_not_keep_the_line_in_memory() -> None:
    (item,) = read_lines(io.BytesIO(b'{"prompt": oops}\n'), 1_000)
    assert isinstance(item.value, InvalidJsonLine)
    assert item.value.__traceback__ is None
    assert item.value.__cause__ is None
