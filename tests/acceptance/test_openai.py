"""The examples of OpenAI's Batch API, unchanged but for base_url and api_key, against a real server and worker."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any, TypeVar

import openai
import pytest
from openai import AzureOpenAI, OpenAI
from openai._models import BaseModel
from openai.types import Batch, Completion
from openai.types.chat import ChatCompletion

from jobs import Client
from tests.acceptance.conftest import CONTEXT_TOKENS, Service

MODEL = "smollm2-135m-instruct"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FINAL = {"completed", "failed", "expired", "cancelled"}

Model = TypeVar("Model", bound=BaseModel)


def checked(reply: Model) -> Model:
    return type(reply).model_validate(reply.to_dict())


def submitted(client: OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT) -> Batch:
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    file = checked(client.files.create(file=("batch.jsonl", content), purpose="batch"))
    assert checked(client.files.wait_for_processing(file.id)).status == "processed"
    assert client.files.content(file.id).read() == content
    return checked(
        client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"team": "a"})
    )


def ended(client: OpenAI, batch: Batch) -> Batch:
    """Poll until a batch has ended; assert that its counts only grow and that no file appears before the end."""
    deadline = time.monotonic() + 240
    counts = (0, 0)
    while batch.status not in FINAL:
        assert time.monotonic() < deadline, batch
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        time.sleep(0.2)
        batch = checked(client.batches.retrieve(batch.id))
        assert batch.request_counts is not None
        now = (batch.request_counts.completed, batch.request_counts.failed)
        assert now[0] >= counts[0]
        assert now[1] >= counts[1]
        counts = now
    return batch


def lines_of(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    text = client.files.content(file_id).text if file_id else ""
    lines = [json.loads(line) for line in text.split("\n") if line]
    by_custom_id = {line["custom_id"]: line for line in lines}
    assert len(by_custom_id) == len(lines)
    return by_custom_id


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = {"model": MODEL, "messages": messages, "max_tokens": 6, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": whole}


def test_a_file_becomes_answers_and_errors_each_line_once(client: OpenAI) -> None:
    bad: dict[str, Any] = {
        "cold": {"temperature": -1},
        "long": {"messages": [{"role": "user", "content": "word " * 20_000}]},
    }
    lines = [chat_line(f"é-{n}", seed=n, n=2 if n == 3 else 1) for n in range(10)]
    batch = ended(client, submitted(client, lines + [chat_line(name, **body) for name, body in bad.items()]))
    assert (batch.status, batch.metadata, batch.model) == ("completed", {"team": "a"}, MODEL)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 12, "completed": 10, "failed": 2}
    output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert output.keys() == {line["custom_id"] for line in lines}
    answers = {name: ChatCompletion.model_validate(line["response"]["body"]) for name, line in output.items()}
    assert all("Paris" in (choice.message.content or "") for a in answers.values() for choice in a.choices)
    assert [choice.index for choice in answers["é-3"].choices] == [0, 1]
    used = [answer.usage.total_tokens for answer in answers.values() if answer.usage]
    assert batch.usage is not None
    assert batch.usage.total_tokens == sum(used)
    found = {name: line["response"]["body"]["error"]["code"] for name, line in errors.items()}
    assert found == {"cold": "invalid_value", "long": "context_length_exceeded"}
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    for file_id in (batch.input_file_id, batch.output_file_id):
        assert checked(client.files.delete(str(file_id))).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(str(file_id))
    assert checked(client.batches.retrieve(batch.id)) == batch


def test_prompts_may_be_texts_lists_and_token_ids(client: OpenAI) -> None:
    prompts: dict[str, Any] = {"text": "One two", "texts": ["One two", "Three"], "ids": [1, 2], "lists": [[1, 2], [3]]}
    options = {"model": MODEL, "n": 2, "max_tokens": 2}
    lines = [
        {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": options | {"prompt": prompt}}
        for name, prompt in prompts.items()
    ]
    batch = ended(client, submitted(client, lines, COMPLETIONS))
    output = lines_of(client, batch.output_file_id)
    answers = {name: Completion.model_validate(line["response"]["body"]) for name, line in output.items()}
    assert {name: [choice.index for choice in answer.choices] for name, answer in answers.items()} == {
        "text": [0, 1],
        "texts": [0, 1, 2, 3],
        "ids": [0, 1],
        "lists": [0, 1, 2, 3],
    }
    tokens = {name: answer.usage.prompt_tokens for name, answer in answers.items() if answer.usage}
    assert (tokens["ids"], tokens["lists"]) == (2, 3)
    assert tokens["texts"] > tokens["text"]


def test_a_gzip_file_of_bare_lines_names_its_model_as_people_do_and_asks_for_nothing(client: OpenAI) -> None:
    names = [MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/SMOLLM2-135M-instruct", "gpt-4o-mini", None]
    idle = {"top_k": -1, "length_penalty": 1.0, "use_beam_search": False, "priority": 0, "extra_body": {}, "tools": []}
    lines = [
        {"custom_id": str(n), "body": chat_line("a", model=name)["body"] | (idle if n % 2 else {})}
        for n, name in enumerate(names)
    ]
    content = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    file = client.files.create(file=("batch.jsonl.gz", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    batch = ended(client, batch)
    assert (batch.status, batch.model) == ("completed", MODEL)
    answers = [line["response"]["body"] for line in lines_of(client, batch.output_file_id).values()]
    assert [answer["model"] for answer in answers] == [MODEL] * len(names)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_the_azure_client_gets_the_same_answers(client: OpenAI, service: Service) -> None:
    asked = chat_line("a")["body"]
    whole = client.chat.completions.create(**asked).choices
    line = json.dumps(chat_line("a") | {"url": "/chat/completions"}).encode()
    with AzureOpenAI(azure_endpoint=service.api_url, api_version="2024-10-21", api_key="unused") as azure:
        assert azure.chat.completions.create(**asked).choices == whole
        assert azure.chat.completions.create(**asked | {"model": "gpt-4o-mini"}).choices == whole
        file = azure.files.create(file=("a.jsonl", line), purpose="batch")
        order: Any = {"input_file_id": file.id, "endpoint": "/chat/completions", "completion_window": "24h"}
        batch = ended(client, azure.batches.create(**order))
    (answer,) = lines_of(client, batch.output_file_id).values()
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == whole[0].message.content


def test_max_tokens_beyond_the_context_end_at_it_with_the_reason_length(client: OpenAI, service: Service) -> None:
    prompt = [1] * (CONTEXT_TOKENS - 7)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 10**10, "temperature": 0}
    answer = client.completions.create(model=MODEL, **body, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 7)
    nested = {"model": MODEL, **body, "extra_body": {"ignore_eos": True}}
    lines = [{"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": nested}]
    (line,) = lines_of(client, ended(client, submitted(client, lines, COMPLETIONS)).output_file_id).values()
    assert line["response"]["body"]["choices"][0]["text"] == answer.choices[0].text
    with Client(service.api_url) as jobs:
        job = jobs.submit(
            [{"prompt": prompt}], endpoint="/v1/completions", max_tokens=10**10, ignore_eos=True, temperature=0
        )
        assert job.wait().request_counts.failed == 0
        (output,) = job.outputs()
    assert (output.choices[0].finish_reason, output.choices[0].completion_tokens) == ("length", 7)


def test_an_answer_replayed_as_history_is_answered_in_every_shape(client: OpenAI) -> None:
    asked = chat_line("a")["body"]
    create = client.chat.completions.create
    message = create(**asked).choices[0].message
    logged = message.to_dict() | {"annotations": [], "reasoning_content": "Hm.", "id": "m", "timestamp": 1.5}
    texts = set()
    for shape in (message, message.model_dump(), message.model_dump(exclude_none=True), logged):
        history = [*asked["messages"], shape, {"role": "user", "content": "Another."}]
        texts.add(create(**asked | {"messages": history}).choices[0].message.content)
    assert len(texts) == 1
    for empty in ({"role": "system", "content": None}, {"role": "user", "content": ""}):
        assert create(**asked | {"messages": [empty, *asked["messages"]]}).choices


def test_a_file_that_is_no_batch_names_its_lines(client: OpenAI) -> None:
    batch = ended(client, submitted(client, [chat_line("a"), chat_line("a"), {"custom_id": "b"}]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(e.code, e.line) for e in batch.errors.data or []] == [
        ("duplicate_custom_id", 2),
        ("missing_required_parameter", 3),
    ]


def test_a_cancelled_batch_answers_every_line(client: OpenAI) -> None:
    names = {f"{n}" for n in range(300)}
    batch = submitted(client, [chat_line(name, max_tokens=200, ignore_eos=True) for name in names])
    assert checked(client.batches.cancel(batch.id)).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert output.keys() | errors.keys() == names
    assert output.keys().isdisjoint(errors)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
