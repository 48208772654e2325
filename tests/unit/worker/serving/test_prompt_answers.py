"""Answers that return their prompt, on the worker's loop: the same after a restart, whole and as events."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, ChatMessage, GenerationRequest, SamplingParameters
from jobs.openai import completions
from jobs.openai.completions import ResponseHeader
from storage import queries, writes
from storage.models import ChoiceOutput, Partial, Request
from storage.records import NewJob, NewRequest
from storage.session import Database
from tests.unit.worker.serving.test_runner import AT_END, MODEL, Worker

SCORED: dict[str, Any] = {"echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}


def submit(database: Database, endpoint: str = COMPLETIONS_ENDPOINT, job_id: str = "batch_1", **fields: Any) -> None:
    prompt = {name: fields.pop(name) for name in ("prompt", "prompts", "messages") if name in fields}
    sampling = SamplingParameters.model_validate({"seed": 1, "max_tokens": 9, "temperature": 0.0, **fields})
    body = GenerationRequest(model=MODEL, sampling=sampling, **prompt).model_dump(mode="json")
    with database.write() as session:
        writes.insert_job(session, NewJob(job_id, MODEL, endpoint, 3600.0), [NewRequest("request-0", body)])


def answer(database: Database, endpoint: str = COMPLETIONS_ENDPOINT, job_id: str = "batch_1") -> Any:
    with database.read() as session:
        (output,) = queries.outputs(session, job_id)
    assert output.error_message is None, output.error_message
    return completions.answer(ResponseHeader("a", endpoint, MODEL, 0, "batch_1"), output)


def test_a_completion_echoes_text_and_logprobs_of_each_of_its_prompts(database: Database) -> None:
    submit(database, prompts=("the cat ", tuple(b"a dog")), **SCORED)
    worker = Worker(database, "a")
    worker.run()
    choices = answer(database)["choices"]
    for choice, prompt in zip(choices, ["the cat ", "the cat ", "a dog", "a dog"], strict=True):
        assert choice["text"].startswith(prompt)
        assert choice["prompt_token_ids"] == list(prompt.encode())
        assert len(choice["token_ids"]) == 9
        told = choice["logprobs"]
        assert "".join(told["tokens"]) == choice["text"]
        assert told["text_offset"] == list(range(len(choice["text"])))
        assert [value is None for value in told["token_logprobs"]] == [True] + [False] * (len(told["tokens"]) - 1)
        own = [
            entry[str(token)]["logprob"]
            for entry, token in zip(choice["prompt_logprobs"][1:], prompt.encode()[1:], strict=True)
        ]
        assert own == told["token_logprobs"][1 : len(prompt)]
        events = [event for event in worker.events if event.choice == choice["index"] and event.type == "tokens"]
        assert "".join(event.text for event in events) == choice["text"]
        assert sum(event.tokens for event in events) == 9


def test_an_answer_of_no_tokens_is_its_prompt(database: Database) -> None:
    submit(database, prompt="the cat ", max_tokens=0, echo=True, logprobs=1)
    worker = Worker(database, "a")
    worker.run()
    found = answer(database)
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the cat ", "length")
    assert len(choice["logprobs"]["token_logprobs"]) == 8
    assert found["usage"] == {"prompt_tokens": 8, "completion_tokens": 0, "total_tokens": 8}
    assert [event.text for event in worker.events if event.type == "tokens"] == ["the cat "]


@pytest.mark.parametrize("turns", [1, 3, 5])
def test_an_answer_that_another_worker_continues_is_the_same(database: Database, turns: int) -> None:
    asked = {"prompts": ("the cat " * 12, tuple(b"a dog")), "max_tokens": 12, **SCORED}
    submit(database, job_id="undisturbed", **asked)
    Worker(database, "a", interval_s=AT_END).run()
    submit(database, **asked)
    leaving = Worker(database, "b")
    for _ in range(turns):
        leaving.runner.run_once(notified=leaving.work_waits())
    leaving.runner.hand_back()
    with database.read() as session:
        assert session.scalars(select(Request).where(Request.job_id == "batch_1")).one().status == "queued"
    heir = Worker(database, "c", interval_s=AT_END)
    heir.run()
    assert heir.model.forwards
    assert answer(database) == answer(database, job_id="undisturbed")


def test_an_echo_alone_is_no_proof_that_a_request_crashes_no_worker(database: Database) -> None:
    submit(database, prompt="x" * 150, echo=True)
    worker = Worker(database, "a")
    worker.runner.run_once(notified=True)
    with database.read() as session:
        assert not list(session.scalars(select(Partial)))
    worker.run()
    assert answer(database)["choices"][0]["text"].startswith("x" * 150)


def test_a_chat_that_continues_a_message_echoes_it(database: Database) -> None:
    turns = (ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="the "))
    submit(database, CHAT_ENDPOINT, messages=turns, continue_final_message=True, echo=True, prompt_logprobs=0)
    Worker(database, "a", interval_s=AT_END).run()
    found = answer(database, CHAT_ENDPOINT)
    assert found["choices"][0]["message"]["content"].startswith("the ")
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


def test_nothing_of_the_prompt_is_stored_unless_asked_for(database: Database) -> None:
    submit(database, prompt="the cat ", logprobs=1)
    Worker(database, "a", interval_s=AT_END).run()
    with database.read() as session:
        assert session.scalars(select(ChoiceOutput)).one().prompt is None
