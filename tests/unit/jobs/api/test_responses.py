"""`/v1/responses` with the openai client, its types, and a worker that answers as soon as it is notified."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from jobs.api.schemas.responses import InputItemPage, ResponseEvent, ResponseReply
from jobs.messages import CHAT_ENDPOINT, RESPONSES_ENDPOINT, GenerationRequest
from storage import queries
from storage.session import Database
from tests.factories import a_key
from tests.unit.jobs.api.test_completions import Serve, calling, reasoning, refuse, with_logprobs
from tests.unit.jobs.api.test_completions import serve as serve  # the fixture
from tests.unit.jobs.api.test_routes import answer_all
from tests.unit.jobs.openai_client import checked, openai_on

ASKED: dict[str, Any] = {"model": "tiny", "input": "Hello", "max_output_tokens": 5}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def nothing(database: Database) -> None:
    """Play a worker that is busy."""


def request_of(database: Database, job_id: str) -> GenerationRequest:
    with database.read() as session:
        found = queries.request(session, job_id, 0)
    assert found is not None
    return GenerationRequest.model_validate(found.body)


def events_of(reply: Any) -> list[dict[str, Any]]:
    """The events of a stream, after validation by the client's types and by ours."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in reply.text.split("\n\n") if block.startswith("event: ")]
    events: list[dict[str, Any]] = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    for event in events:
        EVENT.validate_python(event)
        ResponseEvent.model_validate(event, strict=True)
    return events


def test_a_response_has_every_field_of_openai_s_type_and_of_ours(serve: Serve) -> None:
    given: dict[str, Any] = {"instructions": "Be brief.", "metadata": {"a": "b"}, "user": "me", "temperature": 0.5}
    given["truncation"] = "auto"
    reply = serve().post(RESPONSES_ENDPOINT, json=ASKED | given)
    ours = ResponseReply.model_validate_json(reply.content, strict=True)
    theirs = Response.model_validate(reply.json())
    assert (theirs.output_text, theirs.status, theirs.model) == ("Paris.", "completed", "tiny")
    assert theirs.usage is not None
    assert theirs.usage.total_tokens == theirs.usage.input_tokens + theirs.usage.output_tokens
    assert (ours.instructions, ours.metadata, ours.user) == ("Be brief.", {"a": "b"}, "me")
    assert (ours.temperature, ours.max_output_tokens, ours.truncation) == (0.5, 5, "auto")


def test_a_response_names_the_numerics_of_its_text_once_it_has_one(serve: Serve) -> None:
    api = serve(lambda database: answer_all(database, numerics="fp_1"))
    client = openai_on(api)
    assert client.responses.create(**ASKED, metadata={"a": "b"}).to_dict()["system_fingerprint"] == "fp_1"
    events = events_of(api.post(RESPONSES_ENDPOINT, json=ASKED | {"stream": True}))
    told = [event["response"]["system_fingerprint"] for event in events if "response" in event]
    assert told == [None, None, "fp_1"], "the worker is not known before"


def test_a_response_is_the_chat_of_the_same_conversation(serve: Serve, database: Database) -> None:
    api = serve()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    chat = api.post(CHAT_ENDPOINT, json={"model": "tiny", "messages": messages, "seed": 1, "max_tokens": 5}).json()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": "Bye"},
    ]
    asked = ASKED | {"instructions": "Be brief.", "input": items, "seed": 1}
    response = api.post(RESPONSES_ENDPOINT, json=asked).json()
    stored = request_of(database, response["id"])
    assert stored.model_copy(update={"response": None}) == request_of(database, chat["id"])


def test_a_schema_for_the_text_is_that_of_a_chat(serve: Serve, database: Database) -> None:
    api = serve()
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    made = Response.model_validate(api.post(RESPONSES_ENDPOINT, json=ASKED | {"text": {"format": form}}).json())
    nested = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "response_format": nested}
    chat = api.post(CHAT_ENDPOINT, json=asked).json()
    assert request_of(database, made.id).grammar == request_of(database, chat["id"]).grammar is not None
    assert made.text is not None
    assert made.text.to_dict() == {"format": form}


def test_a_stream_has_the_events_of_its_answer_in_order_for_every_reader(serve: Serve) -> None:
    api = serve()
    told = events_of(api.post(RESPONSES_ENDPOINT, json=ASKED | {"stream": True}))
    assert [event["type"].removeprefix("response.") for event in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    last = told[-1]["response"]
    assert last["output"] == [told[-2]["item"]]
    path = f"{RESPONSES_ENDPOINT}/{last['id']}"
    assert api.get(path).json() == last
    assert events_of(api.get(path, params={"stream": True})) == told
    assert events_of(api.get(path, params={"stream": True, "starting_after": 4})) == told[5:]


def test_the_client_streams_and_retrieves_a_response(serve: Serve) -> None:
    client = openai_on(serve())
    with client.responses.stream(**ASKED) as stream:
        final = stream.get_final_response()
    assert final.output_text == "Paris."
    found = checked(client.responses.retrieve(final.id))
    assert found.output_text == "Paris."
    again = list(client.responses.retrieve(final.id, stream=True))
    assert again[-1].type == "response.completed"


def test_a_text_at_its_cap_is_an_incomplete_response(serve: Serve) -> None:
    api = serve(lambda database: answer_all(database, finish_reason="length"))
    whole = Response.model_validate(api.post(RESPONSES_ENDPOINT, json=ASKED).json())
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    last = events_of(api.post(RESPONSES_ENDPOINT, json=ASKED | {"stream": True}))[-1]
    assert (last["type"], last["response"]["output"][0]["status"]) == ("response.incomplete", "incomplete")


def test_reasoning_is_an_item_of_its_own_before_the_answer(serve: Serve, database: Database) -> None:
    api = serve(reasoning)
    told = events_of(api.post(RESPONSES_ENDPOINT, json=ASKED | {"stream": True}))
    response = Response.model_validate(told[-1]["response"])
    thought, message = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert (thought.content[0].text, message.type, response.output_text) == ("I add.", "message", "4")
    assert response.usage is not None
    assert (response.usage.output_tokens_details.reasoning_tokens, response.temperature) == (1, 0.6)
    for kind, text in (("reasoning_text", "I add."), ("output_text", "4")):
        assert "".join(e["delta"] for e in told if e["type"] == f"response.{kind}.delta") == text
    again = api.get(f"{RESPONSES_ENDPOINT}/{response.id}", params={"stream": True})
    assert events_of(again) == told
    asked = ASKED | {"previous_response_id": response.id}
    (_, answer, _) = request_of(database, api.post(RESPONSES_ENDPOINT, json=asked).json()["id"]).messages or ()
    assert (answer.content, answer.reasoning_content) == ("4", "I add.")
    again_asked = {"role": "user", "content": "And?"}
    items = ASKED | {"input": [{"role": "user", "content": "Hello"}, *told[-1]["response"]["output"], again_asked]}
    assert (request_of(database, api.post(RESPONSES_ENDPOINT, json=items).json()["id"]).messages or ())[1] == answer


def test_calls_are_items_whose_results_continue_the_conversation(serve: Serve, database: Database) -> None:
    client = openai_on(serve(calling))
    tools: Any = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("f", "g")]
    asked: dict[str, Any] = {"model": "tiny", "tools": tools, "parallel_tool_calls": False}
    hello: Any = {"role": "user", "content": "Hello"}
    made = checked(client.responses.create(input=[hello], **asked, tool_choice={"type": "function", "name": "f"}))
    assert made.tool_choice.to_dict() == {"type": "function", "name": "f"}
    assert ([tool.name for tool in made.tools], made.parallel_tool_calls) == (["f", "g"], False)
    message, *calls = made.output
    assert (message.type, made.output_text, made.status) == ("message", "I look.", "completed")
    assert [(c.type, c.name, c.arguments) for c in calls] == [
        ("function_call", "f", '{"a": [1]}'),
        ("function_call", "g", "{}"),
    ]
    results: Any = [{"type": "function_call_output", "call_id": c.call_id, "output": c.name} for c in calls]
    after = client.responses.create(input=results, previous_response_id=made.id, **asked)
    given: Any = [item.to_dict() for item in made.output]
    again = client.responses.create(input=[hello, *given, *results], **asked)
    assert request_of(database, after.id).messages == request_of(database, again.id).messages
    items = client.responses.input_items.list(after.id, order="asc").data
    kinds = ["message", "message", "function_call", "function_call", "function_call_output", "function_call_output"]
    assert [item.type for item in items] == kinds


def test_streamed_calls_are_those_of_the_response(serve: Serve) -> None:
    api = serve(calling)
    told = events_of(api.post(RESPONSES_ENDPOINT, json=ASKED | {"stream": True}))
    output = told[-1]["response"]["output"]
    assert [event["item"] for event in told if event["type"] == "response.output_item.done"] == output
    arguments = [event["arguments"] for event in told if event["type"] == "response.function_call_arguments.done"]
    assert arguments == ['{"a": [1]}', "{}"]
    assert "".join(event["delta"] for event in told if "arguments.delta" in event["type"]) == "".join(arguments)


def test_log_probabilities_come_on_request(serve: Serve) -> None:
    api = serve(with_logprobs)
    asked = ASKED | {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    reply = Response.model_validate(api.post(RESPONSES_ENDPOINT, json=asked).json())
    (message,) = reply.output
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [(token.token, token.bytes) for token in part.logprobs] == [("Paris.", list(b"Paris.")), ("<eos>", [])]
    told = events_of(api.post(RESPONSES_ENDPOINT, json=asked | {"stream": True}))
    assert len(told[-4]["logprobs"]) == 2


def test_a_background_response_is_queued_then_read_later_by_its_id(serve: Serve, database: Database) -> None:
    api = serve(nothing)
    client = openai_on(api)
    queued = checked(client.responses.create(**ASKED, background=True, metadata={"a": "b"}))
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [queued.id], "it is a job like others"
    answer_all(database)
    assert checked(client.responses.retrieve(queued.id)).output_text == "Paris."
    told = events_of(api.get(f"{RESPONSES_ENDPOINT}/{queued.id}", params={"stream": True}))
    assert [event["type"] for event in told[:3]] == ["response.created", "response.queued", "response.in_progress"]


def test_a_background_response_is_cancelled_by_its_id(serve: Serve) -> None:
    client = openai_on(serve(nothing))
    queued = client.responses.create(**ASKED, background=True)
    for _ in range(2):
        assert checked(client.responses.cancel(queued.id)).status == "cancelled"
    last = list(client.responses.retrieve(queued.id, stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.status == "cancelled"


def test_a_conversation_continues_from_a_previous_response_without_its_instructions(
    serve: Serve, database: Database
) -> None:
    client = openai_on(serve())
    first = client.responses.create(**ASKED, instructions="Be brief.")
    second = client.responses.create(**ASKED, previous_response_id=first.id, instructions="Rhyme.")
    third = client.responses.create(model="tiny", input="Bye", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    said = [message.content for message in request_of(database, third.id).messages or ()]
    assert said == ["Hello", "Paris.", "Hello", "Paris.", "Bye"]
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    ResponseItemList.model_validate(items.to_dict())
    assert len(list(items)) == 5, "the client reads page after page"


def test_a_reference_to_an_item_of_an_answer_is_that_item(serve: Serve, database: Database) -> None:
    client = openai_on(serve(reasoning))
    hello: Any = {"role": "user", "content": "Hello"}
    made = client.responses.create(model="tiny", input=[hello])
    references: Any = [{"type": "item_reference", "id": item.id} for item in made.output]
    referring = client.responses.create(model="tiny", input=[hello, *references, hello])
    given: Any = [item.to_dict() for item in made.output]
    giving = client.responses.create(model="tiny", input=[hello, *given, hello])
    assert request_of(database, referring.id).messages == request_of(database, giving.id).messages
    for unknown in ("msg_1", f"{made.output[0].id}0"):
        with pytest.raises(NotFoundError, match=unknown):
            client.responses.create(model="tiny", input=[{"type": "item_reference", "id": unknown}])


def test_input_items_match_their_models(serve: Serve) -> None:
    api = serve()
    made = api.post(RESPONSES_ENDPOINT, json=ASKED | {"instructions": "Be brief."}).json()
    page = InputItemPage.model_validate_json(api.get(f"{RESPONSES_ENDPOINT}/{made['id']}/input_items").content)
    (item,) = page.data
    assert item.type == "message"
    assert item.role == "user"


def test_responses_are_their_owner_s_alone(serve: Serve, database: Database) -> None:
    api = serve()
    mine, other = a_key(database), a_key(database)
    made = api.post(RESPONSES_ENDPOINT, json=ASKED, headers=mine).json()
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        reply = api.request(method, f"{RESPONSES_ENDPOINT}/{made['id']}{path}", headers=other)
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "id")
    reply = api.post(RESPONSES_ENDPOINT, json=ASKED | {"previous_response_id": made["id"]}, headers=other)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "previous_response_not_found")


def test_a_response_that_is_not_stored_is_not_found(serve: Serve) -> None:
    client = openai_on(serve())
    made = client.responses.create(**ASKED, store=False)
    with pytest.raises(NotFoundError, match="store: false"):
        client.responses.retrieve(made.id)
    with pytest.raises(NotFoundError, match="store: false"):
        client.responses.create(**ASKED, previous_response_id=made.id)
    with pytest.raises(NotFoundError, match="store: false"):
        client.responses.create(model="tiny", input=[{"type": "item_reference", "id": made.output[0].id or ""}])


def test_a_previous_response_without_an_answer_is_named(serve: Serve) -> None:
    client = openai_on(serve(nothing))
    queued = client.responses.create(**ASKED, background=True)
    with pytest.raises(BadRequestError, match="has not ended yet"):
        client.responses.create(**ASKED, previous_response_id=queued.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_rejection_by_the_worker_sets_the_status(serve: Serve, stream: bool) -> None:
    reply = serve(refuse).post(RESPONSES_ENDPOINT, json=ASKED | {"stream": stream})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_background_response_that_fails_says_why(serve: Serve) -> None:
    client = openai_on(serve(refuse))
    failed = client.responses.create(**ASKED, background=True)
    found = checked(client.responses.retrieve(failed.id))
    assert found.error is not None
    assert (found.status, found.error.code, found.error.message) == ("failed", "invalid_prompt", "too long")


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "missing_required_parameter", "input"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [{"type": "reasoning"}]}, "invalid_value", "input"),
    ({"input": ["text"]}, "invalid_value", "input[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "unsupported_parameter",
        "input[0].content[0]",
    ),
    ({"input": [{"role": "robot", "content": "a"}]}, "invalid_value", "input[0].role"),
    ({"messages": []}, "unknown_parameter", "messages"),
    ({"prompt": {"id": "a"}}, "unsupported_parameter", "prompt"),
    ({"instructions": 1}, "invalid_value", "instructions"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"truncation": "some"}, "invalid_value", "truncation"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"text": {"form": 1}}, "unknown_parameter", "text.form"),
    (
        {"text": {"format": {"type": "json_schema", "name": "a"}}},
        "missing_required_parameter",
        "text.format.schema",
    ),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"reasoning": {"effect": 1}}, "invalid_value", "reasoning.effect"),
    ({"include": ["all"]}, "invalid_value", "include[0]"),
    ({"metadata": {"a": 1}}, "invalid_value", "metadata"),
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"store": "no"}, "invalid_value", "store"),
    ({"background": True, "store": False}, "invalid_value", "store"),
    ({"stream": 1}, "invalid_value", "stream"),
]


def test_a_bad_body_is_refused_by_the_field_that_was_sent(serve: Serve) -> None:
    api = serve()
    for change, code, param in BAD_BODIES:
        reply = api.post(RESPONSES_ENDPOINT, json=ASKED | change)
        assert reply.status_code == 400, (change, reply.text)
        assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param), change


def test_a_job_takes_bodies_texts_and_lines_of_responses_and_their_parameters(serve: Serve, database: Database) -> None:
    api = serve(nothing)
    line = {"custom_id": "line", "method": "POST", "url": RESPONSES_ENDPOINT, "body": {"input": "Hello"}}
    job = api.post("/v1/jobs", json={"requests": [line, "Hello", {"input": "Hello"}], "max_output_tokens": 7}).json()
    assert job["endpoint"] == RESPONSES_ENDPOINT, "that of the first line"
    with database.read() as session:
        bodies = queries.request_bodies(session, job["id"], range(3)).values()
    requests = [GenerationRequest.model_validate(body) for body in bodies]
    assert {(r.sampling.max_tokens, r.messages) for r in requests} == {(7, requests[0].messages)}
    answer_all(database)
    lines = [json.loads(line) for line in api.get(f"/v1/jobs/{job['id']}/outputs").text.splitlines()]
    assert [line["choices"][0]["text"] for line in lines] == ["Paris."] * 3
    read = api.get(f"{RESPONSES_ENDPOINT}/resp_{job['id']}_2").json()
    assert (read["max_output_tokens"], read["status"]) == (7, "completed")
