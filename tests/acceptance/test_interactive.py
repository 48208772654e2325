"""Chats beside batches, and API keys, with real processes, queue, SQL, SmolLM2 and OpenAI's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jobs.client import Client
from jobs.messages import JobStatus

BASIC = Path(sys.executable).with_name("basic")
MODEL = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
FULL = 4  # engine slots for batches: few, so that a test can fill them


class Service:
    """A running `basic up` with its commands and clients."""

    def __init__(self, data_dir: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
        own = {"BASIC_DATA_DIR": str(data_dir), "BASIC_API_PORT": "0", "BASIC_MAX_SEQUENCES": str(FULL)}
        own["BASIC_CACHE"] = "opt-in"  # an answer is asked for whole and as a stream, and both are decoded
        own["BASIC_THREADS"] = "2"  # `make integration` gives one to every other service
        self.environment = inherited | own
        said = self.basic("up", "--detach", "--json")
        self.api_url = json.loads(said)["api_url"]

    def basic(self, *arguments: str, **environment: str) -> str:
        command, env = [str(BASIC), *arguments], self.environment | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def openai(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.api_url}/v1", api_key=key, max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("data"))
    yield running
    running.basic("down")


def strict(model: type[Any], reply: Any) -> Any:
    """Validate a reply against the client's own types, which the client itself does not check."""
    return model.model_validate(reply.to_dict())


def test_openai_s_client_chats_whole_and_streamed_with_the_same_text(service: Service) -> None:
    with service.openai() as client:
        create = client.chat.completions.create
        whole = strict(ChatCompletion, create(model=MODEL, messages=QUESTION, max_tokens=30, temperature=0))
        chunks = [
            strict(ChatCompletionChunk, chunk)
            for chunk in create(
                model=MODEL,
                messages=QUESTION,
                max_tokens=30,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
    assert "Paris" in whole.choices[0].message.content
    *said, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert said[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert usage.usage == whole.usage


def test_openai_s_client_completes_text_whole_and_streamed(service: Service) -> None:
    with service.openai() as client:
        create = client.completions.create
        prompt: Any = {"model": MODEL, "prompt": "The river runs past", "max_tokens": 20, "temperature": 0, "n": 2}
        whole = strict(Completion, create(**prompt))
        texts = ["", ""]
        for chunk in create(**prompt, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == texts
    assert whole.usage.completion_tokens <= 40


def test_errors_come_as_the_client_s_own_exceptions(service: Service) -> None:
    with service.openai() as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as unknown:
            create(model="gpt-9", messages=QUESTION)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        assert unknown.value.request_id is not None
        long: Any = [{"role": "user", "content": "word " * 20_000}]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as too_long:
                create(model=MODEL, messages=long, stream=stream)
            assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")


def test_a_chat_is_answered_while_a_batch_fills_the_engine(service: Service) -> None:
    with Client(service.api_url) as jobs, service.openai() as client:
        batch = jobs.submit(["Tell a long story."] * 3 * FULL, max_tokens=400, ignore_eos=True)
        for event in batch.follow():
            if event.type == "tokens":
                break
        chat = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0)
        left = batch.info()
        assert chat.choices[0].message.content
        assert left.status is JobStatus.IN_PROGRESS
        assert left.request_counts.completed == 0, "the first of the batch was still being written"
        assert chat.id not in [job.id for job in jobs.jobs()]
        batch.cancel()
        batch.wait(poll_s=0.1)


def test_a_client_that_disconnects_cancels_its_request(service: Service) -> None:
    with Client(service.api_url) as jobs, service.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        job_id = next(iter(stream)).id
        stream.close()
        assert jobs.job(job_id).wait(poll_s=0.1).status is JobStatus.CANCELLED

        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).chat.completions.create(
                model=MODEL, messages=QUESTION, max_tokens=3000, extra_body={"ignore_eos": True}
            )
        ended = json.loads(
            subprocess.run(
                ["curl", "-s", f"{service.api_url}/v1/jobs?interactive=true&limit=1"], capture_output=True, check=True
            ).stdout
        )
        assert jobs.job(ended["data"][0]["id"]).wait(poll_s=0.1).status is JobStatus.CANCELLED


def test_after_the_first_key_others_need_one_and_the_owner_s_commands_still_work(service: Service) -> None:
    made = json.loads(service.basic("keys", "create", "alice", "--json"))
    with pytest.raises(openai.AuthenticationError), service.openai("wrong") as stranger:
        stranger.models.list()
    with service.openai(made["key"]) as alice:
        assert [model.id for model in alice.models.list()] == [MODEL]
        chat = alice.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5)
        assert chat.choices[0].message.content
        with Client(service.api_url, made["key"]) as own:
            assert own.jobs() == [], "the batch that was submitted before is nobody's of hers"
        assert len(json.loads(service.basic("jobs", "--json"))) == 1
        service.basic("keys", "revoke", "alice")
        with pytest.raises(openai.AuthenticationError):
            alice.models.list()
    assert json.loads(service.basic("jobs", "--json", BASIC_API_KEY="")) != []


def test_without_a_key_the_api_server_refuses_to_listen_on_a_network(tmp_path: Path) -> None:
    command = [str(BASIC), "api", "--host", "0.0.0.0", "--port", "0"]
    env = os.environ | {"BASIC_DATA_DIR": str(tmp_path)}
    subprocess.run([str(BASIC), "db", "upgrade"], env=env, check=True, capture_output=True)
    began = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, time.monotonic() - began
    assert "There is no API key" in done.stderr
    assert "basic keys create" in done.stderr
