"""The cache at the service's own doors: the command, chats, streams and events."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

from tests.acceptance.conftest import Service

MODEL = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "Name a colour."}]


def submitted(service: Service, name: str, *options: str, lines: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Submit a job, wait for its end, and return it and its outputs, with their texts alone."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = service.basic("submit", "-", "--name", name, "--max-tokens", "8", *options, "--wait", "--json", stdin=text)
    assert done.returncode == 0, done.stderr
    (job_id,) = service.rows("SELECT id FROM jobs WHERE name = ?", name)[0]
    info = json.loads(service.basic("status", str(job_id), "--json").stdout)
    outputs = service.rows("SELECT text, token_ids FROM outputs WHERE job_id = ? ORDER BY request_index", job_id)
    return info, outputs


def test_equal_requests_are_computed_once_in_a_job_and_between_jobs(service: Service) -> None:
    lines = [{"prompt": "The sea is"}] * 10
    plain, computed = submitted(service, "plain", "--no-cache", lines=lines)
    first, texts = submitted(service, "first", "--cache", lines=lines)
    second, again = submitted(service, "second", "--cache", lines=lines)
    assert [info["progress"]["requests_cached"] for info in (plain, first, second)] == [0, 9, 10]
    assert computed == texts == again
    emitted = service.rows(
        "SELECT decision, sum(emitted_tokens), sum(step_ms) FROM decode_steps WHERE job_id = ? GROUP BY 1", second["id"]
    )
    assert emitted == [("cached", second["progress"]["completion_tokens"], 0.0)]


def test_a_seed_by_identity_makes_sampled_requests_equal(service: Service) -> None:
    options = ("--temperature", "1", "--seed", "identity", "--cache")
    info, outputs = submitted(service, "sampled", *options, lines=[{"prompt": "Once"}] * 2 + [{"prompt": "Twice"}])
    assert info["progress"]["requests_cached"] == 1
    assert outputs[0] == outputs[1]


def test_a_chat_and_a_stream_get_the_answer_that_is_there(service: Service, client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 1.0, "seed": 77}
    asked["extra_body"] = {"cache": True}
    computed = client.chat.completions.create(**asked)
    copied = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert copied.choices[0].message.content == computed.choices[0].message.content == told
    assert computed.usage is not None
    usages = [computed.usage, copied.usage, chunks[-1].usage]
    cached = [usage.to_dict().get("cached_answer_tokens") for usage in usages if usage is not None]
    assert cached == [None, computed.usage.total_tokens, computed.usage.total_tokens]
    other = client.chat.completions.create(**asked | {"seed": 78})
    again = client.chat.completions.create(**asked | {"extra_body": {"cache": False}})
    for reply in (other, again):
        assert reply.usage is not None
        assert "cached_answer_tokens" not in reply.usage.to_dict()
    assert again.choices[0].message.content == told
