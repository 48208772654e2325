"""Chat and text completions, with a worker that answers as soon as it is notified."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import AuthenticationError, AzureOpenAI, NotFoundError, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from sqlalchemy import select

from jobs.api.app import make_api
from jobs.client.results import Output
from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, AnswerFormat, CallAnswer, ReasoningFormat
from jobs.openai.call_formats import HERMES
from jobs.openai.completions import call_id
from jobs.openai.logprobs import ScoredToken, TokenAlternatives
from jobs.openai.prompt_details import PromptDetails, PromptToken
from jobs.settings import JobsSettings
from storage import leases, queries, writes
from storage.job_filter import JobFilter
from storage.models import JobRow
from storage.records import RequestFailure, RequestPlan, RequestProgress
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key, a_worker_card
from tests.unit.jobs.api.test_routes import answer_all

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "Hello"}

Serve = Callable[..., TestClient]


@pytest.fixture
def serve(settings: JobsSettings, database: Database) -> Iterator[Serve]:
    """Start an API server that calls `work` with the database in place of a notification."""
    clients: list[TestClient] = []

    def start(work: Callable[[Database], None] = answer_all, **changes: Any) -> TestClient:
        with database.write() as session:
            writes.register_worker(session, a_worker_card(target="tiny", context_tokens=100))
        app = make_api(settings.model_copy(update=changes), database, lambda job_id, model: work(database))
        clients.append(ApiClient(app, raise_server_exceptions=False))
        return clients[-1].__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def chunks(reply: Any) -> list[Any]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, end = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert end == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_is_answered_in_openai_s_shape(serve: Serve) -> None:
    reply = serve().post(CHAT_ENDPOINT, json=CHAT)
    answer = ChatCompletion.model_validate(reply.json())
    assert answer.choices[0].message.content == "Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_prompt_is_completed_in_openai_s_shape(serve: Serve) -> None:
    answer = Completion.model_validate(serve().post(COMPLETIONS_ENDPOINT, json=PROMPT).json())
    assert (answer.object, answer.choices[0].text) == ("text_completion", "Paris.")


def test_a_stream_starts_with_the_role_and_ends_with_finish_reason_and_usage(serve: Serve) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    told = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks(serve().post(CHAT_ENDPOINT, json=body))]
    *said, usage = told
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == "Paris."
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + ["stop"]
    assert (usage.choices, usage.usage is not None) == ([], True)
    assert len({chunk.id for chunk in told}) == 1


def reasoning(database: Database, text: str = "I add.\n</think>\n\n4", *, included: bool = True) -> None:
    form = AnswerFormat(reasoning=ReasoningFormat(start="<think>", end="</think>", opened=True, included=included))
    plan = RequestPlan(form.model_dump(mode="json"), {"temperature": 0.6})
    answer_all(database, text, plan=plan, reasoning_tokens=1)


def test_a_chat_is_split_into_reasoning_and_content_whole_and_streamed(serve: Serve) -> None:
    api = serve(reasoning)
    whole = ChatCompletion.model_validate(api.post(CHAT_ENDPOINT, json=CHAT).json())
    message = whole.choices[0].message.to_dict()
    assert message == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "I add.",
        "reasoning": "I add.",
        "refusal": None,
    }
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 1
    streamed = chunks(api.post(CHAT_ENDPOINT, json=CHAT | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    for name in ("content", "reasoning_content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    job = api.post("/v1/jobs", json={"prompts": ["2+2?"], "model": "tiny"}).json()
    (line,) = map(json.loads, api.get(f"/v1/jobs/{job['id']}/outputs").text.splitlines())
    assert line["sampling_defaults"] == {"temperature": 0.6}
    assert api.get(f"/v1/jobs/{job['id']}").json()["sampling_defaults"] == {"temperature": 0.6}
    assert "sampling_defaults" not in api.get("/v1/jobs").json()["data"][0], "one row per job"
    choice = Output.model_validate(line).choices[0]
    assert (choice.text, choice.content, choice.reasoning_content) == ("I add.\n</think>\n\n4", "4", "I add.")
    assert choice.answer == "4"


def test_an_answer_with_nothing_but_reasoning_has_a_null_content(serve: Serve) -> None:
    reply = serve(lambda database: reasoning(database, "I add.")).post(CHAT_ENDPOINT, json=CHAT).json()
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "I add.")


def test_a_reasoning_that_is_not_to_be_included_is_left_out(serve: Serve) -> None:
    api = serve(lambda database: reasoning(database, included=False))
    message = api.post(CHAT_ENDPOINT, json=CHAT).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "4", "refusal": None}
    streamed = chunks(api.post(CHAT_ENDPOINT, json=CHAT | {"stream": True}))
    assert all(not chunk["choices"][0]["delta"].keys() & {"reasoning", "reasoning_content"} for chunk in streamed)


CALLS = HERMES.calls([("f", '{"a": [1]}'), ("g", "{}")])


def calling(database: Database, text: str = f"I look.\n{CALLS}", named: bool = False) -> None:
    form = AnswerFormat(calls=CallAnswer(form="hermes", named=named))
    answer_all(database, text, plan=RequestPlan(form.model_dump(mode="json")))


def test_calls_are_answered_whole_streamed_and_as_outputs_of_a_job_in_openai_s_shape(serve: Serve) -> None:
    api = serve(calling)
    reply = api.post(CHAT_ENDPOINT, json=CHAT).json()
    (choice,) = ChatCompletion.model_validate(reply).choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    calls = reply["choices"][0]["message"]["tool_calls"]
    assert [(call["type"], call["function"]) for call in calls] == [
        ("function", {"name": "f", "arguments": '{"a": [1]}'}),
        ("function", {"name": "g", "arguments": "{}"}),
    ]
    (line,) = map(json.loads, api.get(f"/v1/jobs/{reply['id']}/outputs").text.splitlines())
    output = Output.model_validate(line).choices[0]
    assert line["choices"][0]["tool_calls"] == calls, "the ids are the same in every form"
    assert (output.finish_reason, output.answer, output.text[-12:]) == ("tool_calls", "I look.", "</tool_call>")
    assert [call.function.name for call in output.tool_calls] == ["f", "g"]


def test_streamed_calls_have_id_and_name_once_and_then_arguments(serve: Serve) -> None:
    streamed = chunks(serve(calling).post(CHAT_ENDPOINT, json=CHAT | {"stream": True}))
    told = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in streamed]
    assert "".join(choice.delta.content or "" for choice in told) == "I look."
    assert [choice.finish_reason for choice in told if choice.finish_reason] == ["tool_calls"]
    parts = [part for choice in told for part in choice.delta.tool_calls or ()]
    for index, arguments in enumerate(['{"a": [1]}', "{}"]):
        first, *rest = [part for part in parts if part.index == index]
        assert first.id == call_id(streamed[0]["id"], 0, 0, index)
        assert all(part.id is None and part.function is not None and part.function.name is None for part in rest)
        assert "".join(part.function.arguments or "" for part in rest if part.function) == arguments


def test_an_answer_of_calls_has_a_null_content_and_ends_as_openai_says(serve: Serve) -> None:
    call = HERMES.call("f", "{}")
    for named, reason in ((False, "tool_calls"), (True, "stop")):
        api = serve(lambda database, named=named: calling(database, call, named))
        choice = api.post(CHAT_ENDPOINT, json=CHAT).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, reason)
        *_, last = chunks(api.post(CHAT_ENDPOINT, json=CHAT | {"stream": True}))
        assert last["choices"][0]["finish_reason"] == reason


def test_what_is_no_whole_call_is_content_or_a_call_without_its_end(serve: Serve) -> None:
    begun = serve(lambda database: calling(database, '<tool_call>\n{"name": "f"'))
    choice = begun.post(CHAT_ENDPOINT, json=CHAT).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('<tool_call>\n{"name": "f"', "stop")
    assert "tool_calls" not in choice["message"]
    cut = serve(lambda database: calling(database, '<tool_call>\n{"name": "f", "arguments": {"a'))
    choice = cut.post(CHAT_ENDPOINT, json=CHAT).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a'}
    assert choice["finish_reason"] == "stop", "not tool_calls: the call is incomplete"


def with_logprobs(database: Database) -> None:
    token = TokenAlternatives(
        ScoredToken("Paris.", -0.25, tuple(b"Paris.")), (ScoredToken("Rome.", -0.2, tuple(b"Rome.")),)
    )
    end = TokenAlternatives(ScoredToken("<eos>", -0.5, None), ())
    answer_all(database, logprobs=(token.stored(), end.stored()))


def test_a_chat_returns_logprobs_on_request_also_at_the_end_of_a_stream(serve: Serve) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    api = serve(with_logprobs)
    told = ChatCompletion.model_validate(api.post(CHAT_ENDPOINT, json=body).json()).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [(t.token, t.logprob, t.bytes) for t in told.content] == [
        ("Paris.", -0.25, list(b"Paris.")),
        ("<eos>", -0.5, None),
    ]
    assert told.content[0].top_logprobs[0].token == "Rome."
    streamed = [
        ChatCompletionChunk.model_validate(chunk).choices[0].logprobs
        for chunk in chunks(api.post(CHAT_ENDPOINT, json=body | {"stream": True}))
    ]
    assert [t for part in streamed if part for t in part.content or []] == told.content


def test_a_completion_returns_logprobs_on_request(serve: Serve) -> None:
    answer = Completion.model_validate(
        serve(with_logprobs).post(COMPLETIONS_ENDPOINT, json=PROMPT | {"logprobs": 1}).json()
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert (told.tokens, told.text_offset) == (["Paris.", "<eos>"], [0, 6])
    assert told.top_logprobs == [{"Rome.": -0.2, "Paris.": -0.25}, {"<eos>": -0.5}]


PROMPT_TOKENS = (
    PromptToken((72,), 0, TokenAlternatives(ScoredToken("Hel", None, tuple(b"Hel")), ())),
    PromptToken(
        (73, 74),
        4,
        TokenAlternatives(ScoredToken("lo", -3.5, tuple(b"lo")), (ScoredToken("p", -0.5, tuple(b"p")),)),
    ),
)


def with_prompt_details(database: Database) -> None:
    with database.read() as session:
        echoes = session.scalars(select(JobRow.endpoint)).first() == COMPLETIONS_ENDPOINT
    details = PromptDetails(token_ids=(72, 73), top=1, echo_top=1 if echoes else None, tokens=PROMPT_TOKENS)
    token = TokenAlternatives(ScoredToken("Paris.", -0.25, tuple(b"Paris.")), ())
    answer_all(database, "HelloParis.", logprobs=(token.stored(),), prompt=details.stored())


VLLM_PROMPT = [
    None,
    {
        "73": {"logprob": -3.5, "rank": 4, "decoded_token": "lo"},
        "74": {"logprob": -0.5, "rank": 1, "decoded_token": "p"},
    },
]


def test_a_chat_returns_token_ids_and_prompt_logprobs_in_vllm_s_shape(serve: Serve) -> None:
    api = serve(with_prompt_details)
    told = api.post(CHAT_ENDPOINT, json=CHAT | {"prompt_logprobs": 1, "return_token_ids": True}).json()
    assert (told["prompt_token_ids"], told["prompt_logprobs"]) == ([72, 73], VLLM_PROMPT)
    assert told["choices"][0]["token_ids"] == [1, 2]
    assert [t["token"] for t in told["choices"][0]["logprobs"]["content"]] == ["Paris."], "a chat echoes none"
    *_, last = chunks(api.post(CHAT_ENDPOINT, json=CHAT | {"stream": True}))
    assert (last["prompt_token_ids"], last["prompt_logprobs"]) == ([72, 73], VLLM_PROMPT)
    assert last["choices"][0]["token_ids"] == [1, 2]


def test_a_completion_echoes_its_prompt_with_logprobs_of_which_the_first_is_null(serve: Serve) -> None:
    api = serve(with_prompt_details)
    body = PROMPT | {"echo": True, "logprobs": 1}
    (choice,) = api.post(COMPLETIONS_ENDPOINT, json=body).json()["choices"]
    assert choice["text"] == "HelloParis."
    told = choice["logprobs"]
    assert told["tokens"] == ["Hel", "lo", "Paris."]
    assert told["token_logprobs"] == [None, -3.5, -0.25]
    assert told["top_logprobs"] == [None, {"p": -0.5, "lo": -3.5}, {"Paris.": -0.25}]
    assert told["text_offset"] == [0, 3, 5]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 73], [1, 2])
    assert choice["prompt_logprobs"] == VLLM_PROMPT
    *_, last = chunks(api.post(COMPLETIONS_ENDPOINT, json=body | {"stream": True}))
    assert last["choices"][0]["logprobs"] == told
    assert last["choices"][0]["prompt_token_ids"] == [72, 73]


def test_answers_have_no_such_fields_where_nothing_asks_for_them(serve: Serve) -> None:
    api = serve()
    for answer in (
        api.post(CHAT_ENDPOINT, json=CHAT).json(),
        api.post(COMPLETIONS_ENDPOINT, json=PROMPT).json(),
    ):
        assert not {"prompt_logprobs", "prompt_token_ids", "token_ids"} & (answer | answer["choices"][0]).keys()


def test_a_completion_stream_has_no_roles_and_no_usage_unless_requested(serve: Serve) -> None:
    told = chunks(serve().post(COMPLETIONS_ENDPOINT, json=PROMPT | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == "Paris."
    assert told[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in told)


def test_a_call_is_a_job_of_its_key_that_is_listed_only_with_interactive(serve: Serve, database: Database) -> None:
    api = serve()
    key = a_key(database)
    answer = api.post(CHAT_ENDPOINT, json=CHAT, headers=key).json()
    with database.read() as session:
        job = queries.job(session, answer["id"])
    assert job is not None
    assert (job.status, job.api_key_id is None) == ("completed", False)
    assert api.get("/v1/jobs", headers=key).json()["data"] == []
    listed = api.get("/v1/jobs", params={"interactive": True}, headers=key).json()["data"]
    assert [job["id"] for job in listed] == [answer["id"]]


@pytest.mark.parametrize("model", ["openai/TINY", "gpt-4o-mini", "org/tiny"])
def test_every_name_of_a_model_is_answered_with_its_own(serve: Serve, model: str) -> None:
    api = serve(model_aliases="gpt-4o-mini=tiny")
    assert api.post(CHAT_ENDPOINT, json=CHAT | {"model": model}).json()["model"] == "tiny"
    assert api.get(f"/v1/models/{model}").json()["id"] == "tiny"


def test_the_azure_client_s_paths_and_key_reach_the_same_routes(serve: Serve, database: Database) -> None:
    api = serve()
    key = a_key(database)["authorization"].removeprefix("Bearer ")
    host: Any = {
        "azure_endpoint": "http://testserver",
        "api_version": "2024-10-21",
        "http_client": api,
        "max_retries": 0,
    }
    azure = AzureOpenAI(api_key=key, **host)
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    assert azure.chat.completions.create(**asked).choices[0].message.content == "Paris."
    assert azure.completions.create(model="tiny", prompt="Hello").choices[0].text == "Paris."
    named = AzureOpenAI(api_key=key, azure_deployment="tiny", **host)
    assert named.chat.completions.create(**asked | {"model": "gpt-4o"}).model == "tiny"
    file = azure.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    order: Any = {"input_file_id": file.id, "endpoint": "/chat/completions", "completion_window": "24h"}
    batch = azure.batches.create(**order)
    assert azure.batches.retrieve(batch.id).endpoint == CHAT_ENDPOINT
    assert [model.id for model in azure.models.list()] == ["tiny"]
    newer = OpenAI(base_url="http://testserver/openai/v1/", api_key=key, http_client=api, max_retries=0)
    assert newer.chat.completions.create(**asked).model == "tiny"
    for refused in (AzureOpenAI(api_key="wrong", **host), AzureOpenAI(azure_ad_token="wrong", **host)):
        with pytest.raises(AuthenticationError):
            refused.models.list()
    with pytest.raises(NotFoundError):
        AzureOpenAI(api_key=key, azure_deployment="gpt-9", **host).chat.completions.create(**asked)


def test_options_of_a_stream_that_ask_for_nothing_need_no_stream(serve: Serve) -> None:
    assert serve().post(CHAT_ENDPOINT, json=CHAT | {"stream_options": {"include_usage": False}}).status_code == 200


BAD_CALLS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": None}, 400, "missing_required_parameter", "model"),
    ({"model": "gpt-9"}, 404, "model_not_found", "model"),
    ({"messages": None}, 400, "missing_required_parameter", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"prompt": "Hello"}, 400, "unknown_parameter", "prompt"),
    ({"custom_id": "a"}, 400, "unknown_parameter", "custom_id"),
    ({"temperature": -1}, 400, "invalid_value", "temperature"),
    ({"max_tokens": True}, 400, "invalid_value", "max_tokens"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "invalid_value", "stream_options"),
    ({"tools": [{}]}, 400, "missing_required_parameter", "tools[0].function"),
    ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_CALLS)
def test_a_bad_call_is_refused_and_leaves_no_job(
    serve: Serve, database: Database, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    reply = serve().post(CHAT_ENDPOINT, json=CHAT | change)
    assert reply.status_code == status, reply.text
    assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param)
    with database.read() as session:
        assert queries.jobs(session, 10, wanted=JobFilter(interactive=True)).jobs == ()


def refuse(database: Database) -> None:
    """Play a worker that rejects a prompt that is too long."""
    with database.write() as session:
        (claim,) = leases.claim(session, "w", "tiny", 1, 30.0)
    with database.write() as session:
        failure = RequestFailure("context_length_exceeded", "too long", "messages")
        writes.flush(session, "w", 30.0, [RequestProgress(claim.lease, failure=failure)], [claim.lease])


@pytest.mark.parametrize("stream", [False, True])
def test_a_rejection_by_the_worker_sets_the_status_streamed_or_not(serve: Serve, stream: bool) -> None:
    reply = serve(refuse).post(CHAT_ENDPOINT, json=CHAT | {"stream": stream})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_cancelled_with_504(serve: Serve, database: Database, stream: bool) -> None:
    cancelled = threading.Event()
    real = writes.request_cancel

    def cancel(*arguments: Any) -> Any:
        done = real(*arguments)
        cancelled.set()
        return done

    api = serve(lambda database: None, interactive_timeout_s=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writes, "request_cancel", cancel)
        reply = api.post(CHAT_ENDPOINT, json=CHAT | {"stream": stream})
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "request_timeout"
        assert cancelled.wait(60)


def test_without_a_worker_a_call_gets_503_at_once(settings: JobsSettings, database: Database) -> None:
    with ApiClient(make_api(settings, database, lambda job_id, model: None)) as api:
        reply = api.post(CHAT_ENDPOINT, json=CHAT)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 0
