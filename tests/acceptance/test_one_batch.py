"""One job through every public interface: real processes, a Redis-protocol server, SQLite and SmolLM2.

The tests use what a user has: the `basic` command, HTTP, Redis and SQL.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import redis

from jobs.client import Client
from jobs.messages import PartialEvent, PromptBatch
from jobs.producer import batch_job_id, push
from jobs.streaming.pubsub import channel
from tests.acceptance.conftest import Service

MODEL = "smollm2-135m-instruct"
ROUNDING = 0.5  # of a bfloat16 logit, in units of logits
PROMPTS = [
    "What is the capital of France?",
    "Repeat this sentence three times: the river runs past the old mill and the old mill stands by the river.",
    "Count from one to twenty in words.",
    "Name two colours.",
]


def assert_greedy(prompts: list[str], texts: list[str]) -> None:
    """Assert that each token of the texts is the argmax of transformers' own float32 model.

    A worker in bfloat16 rounds differently: of two tokens within ROUNDING of each other it may take either.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.loading.model_store import resolve
    from worker.settings import WorkerSettings

    path = resolve(MODEL, WorkerSettings().cache_dir)
    # transformers' types do not declare these methods
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        turns = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
        short = logits.max(-1).values - logits[torch.arange(len(written)), torch.tensor(written)]
        assert short.max() < ROUNDING, f"{prompt!r}: {tokenizer.decode(written[int(short.argmax())])!r}"
        assert (short == 0).float().mean() > 0.9


def assert_steps_add_up(service: Service, job_id: str) -> None:
    differing = service.rows(
        """SELECT o.request_index, o.completion_tokens, sum(s.emitted_tokens)
           FROM outputs o JOIN decode_steps s USING (job_id, request_index, choice_index)
           WHERE o.job_id = ? GROUP BY o.request_index, o.choice_index
           HAVING o.completion_tokens <> sum(s.emitted_tokens) OR max(s.accepted_tokens - s.tree_nodes) > 0""",
        job_id,
    )
    assert not differing


def test_a_submitted_file_ends_in_outputs_steps_and_a_closing_table(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"custom_id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
    done = service.basic("submit", str(file), "--follow", "--max-tokens", "40", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "speed-up over plain" in done.stdout
    (job_id,) = service.rows("SELECT id FROM jobs ORDER BY created_at DESC LIMIT 1")[0]
    results = service.basic("results", job_id, "--json")
    texts = {line["custom_id"]: line["choices"][0]["text"] for line in map(json.loads, results.stdout.splitlines())}
    assert_greedy(PROMPTS, [texts[f"p{i}"] for i in range(len(PROMPTS))])
    assert all(line in done.stdout for line in texts["p0"].splitlines())
    assert_steps_add_up(service, job_id)
    ((speedup, emitted),) = service.rows("SELECT speedup, emitted_tokens FROM job_speedup WHERE job_id = ?", job_id)
    assert speedup > 0
    assert emitted > 0


def test_partials_on_redis_are_numbered_and_spell_the_output(service: Service) -> None:
    batch = PromptBatch(
        id="watched", model=MODEL, requests=tuple(PROMPTS), parameters={"max_tokens": 30, "temperature": 0}
    )
    job_id = batch_job_id(batch.id)
    with redis.Redis.from_url(service.redis_url, decode_responses=True) as client, client.pubsub() as subscription:
        subscription.subscribe(channel(job_id))
        assert subscription.get_message(timeout=240)["type"] == "subscribe"
        assert push(batch, service.redis_url) == "watched"
        events = list(_until_the_job_ends(subscription))
        push(batch, service.redis_url)
    for index in range(len(PROMPTS)):
        own = [e for e in events if e.index == index]
        assert [e.seq for e in own] == list(range(len(own)))
        ((text, tokens),) = service.rows(
            "SELECT text, completion_tokens FROM outputs WHERE job_id = ? AND request_index = ?", job_id, index
        )
        assert "".join(e.text for e in own) == text
        assert sum(e.tokens for e in own) == tokens
    assert service.rows("SELECT count(*) FROM jobs WHERE id = ?", job_id) == [(1,)]


def _until_the_job_ends(subscription: redis.client.PubSub) -> Iterator[PartialEvent]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        message = subscription.get_message(timeout=1)
        if message is None or message["type"] != "message":
            continue
        event = PartialEvent.model_validate_json(message["data"])
        if event.type == "job":
            return
        yield event
    raise AssertionError("the job did not end in time")


def test_killing_the_worker_loses_nothing_and_changes_no_text_as_a_verification_proves(
    service: Service, tmp_path: Path
) -> None:
    parameters: dict[str, Any] = {"max_tokens": 90, "temperature": 1.0, "seed": 11}
    with Client(service.api_url) as client:
        undisturbed = client.submit(PROMPTS, **parameters)
        undisturbed.wait()
        job = client.submit(PROMPTS, **parameters)
        for event in job.follow():
            if event.type == "tokens":
                break
        ((pid, worker),) = service.rows(
            "SELECT pid, id FROM workers WHERE stopped_at IS NULL ORDER BY started_at DESC LIMIT 1"
        )
        os.kill(pid, signal.SIGKILL)
        assert job.wait().status == "completed"
        assert [o.text for o in job.outputs()] == [o.text for o in undisturbed.outputs()]
    assert_steps_add_up(service, job.id)
    ((attempts,),) = service.rows("SELECT max(attempts) FROM requests WHERE job_id = ?", job.id)
    assert attempts >= 2, "on a busy machine a lease may lapse, too"
    owners = {
        owner for (owner,) in service.rows("SELECT DISTINCT worker_id FROM decode_steps WHERE job_id = ?", job.id)
    }
    assert len(owners) == 2
    assert worker in owners
    proof = tmp_path / "proof.json"
    verified = service.basic("verify", job.id, "--sample", "100%", "--report", str(proof))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    report = json.loads(proof.read_text())
    assert report["counts"] == {"equal": len(PROMPTS), "different": 0, "not_comparable": 0}
    assert service.basic("verify", "--check", str(proof)).returncode == 0
    ((drafted,),) = service.rows("SELECT sum(tree_nodes) FROM decode_steps WHERE job_id = ?", report["id"])
    assert drafted == 0, "texts with drafts, resumed by another process, equal those without"


def test_bad_requests_fail_alone_and_say_line_and_field(service: Service, tmp_path: Path) -> None:
    lines = [
        '{"custom_id": "good", "prompt": "Say hello."}',
        "this is no JSON",
        '{"custom_id": "empty", "prompt": ""}',
        '{"custom_id": "cold", "prompt": "x", "temperature": -1}',
        '{"custom_id": "none", "prompt": "x", "max_tokens": 0}',
        '{"custom_id": "many", "prompt": "x", "n": 1000000}',
        json.dumps({"custom_id": "long", "prompt": "word " * 20_000}),
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines))
    done = service.basic("submit", str(file), "--follow", "--max-tokens", "8", "--temperature", "0", "--json")
    ((job_id, completed, failed),) = service.rows(
        "SELECT id, requests_completed, requests_failed FROM jobs ORDER BY created_at DESC LIMIT 1"
    )
    assert (completed, failed) == (1, 6), done.stdout + done.stderr
    errors = {
        custom_id: (code, param, message)
        for custom_id, code, param, message in service.rows(
            """SELECT custom_id, error_code, error_param, error_message
               FROM requests WHERE job_id = ? AND status = 'failed'""",
            job_id,
        )
    }
    assert errors.pop("request-1")[0] == "invalid_json_line"
    assert {name: (code, param) for name, (code, param, _) in errors.items()} == {
        "empty": ("invalid_value", "prompt"),
        "cold": ("invalid_value", "temperature"),
        "none": ("invalid_value", "max_tokens"),
        "many": ("invalid_value", "n"),
        "long": ("context_length_exceeded", "prompt"),
    }
    assert "line 4" in errors["cold"][2]


def test_an_unknown_model_is_refused_with_those_there_are(service: Service) -> None:
    reply = httpx.post(f"{service.api_url}/v1/jobs", json={"model": "gpt-9", "prompts": ["x"]}, timeout=240)
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]


def test_plain_http_submits_polls_streams_and_fetches(service: Service) -> None:
    with httpx.Client(base_url=service.api_url, timeout=240) as http:
        submitted = http.post("/v1/jobs", json={"prompts": ["Say hello."], "max_tokens": 12, "temperature": 0}).json()
        job = f"/v1/jobs/{submitted['id']}"
        with http.stream("GET", f"{job}/events") as stream:
            data = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert data[-1]["type"] == "job"
        assert http.get(job).json()["status"] == "completed"
        (answer,) = map(json.loads, http.get(f"{job}/outputs").text.splitlines())
        streamed = "".join(e["text"] for e in data if e["type"] == "tokens")
        assert answer["choices"][0]["text"] == streamed
        assert http.get(f"{job}/stats").status_code == 200


def test_generate_writes_the_same_tokens_in_every_mode(service: Service) -> None:
    texts = set()
    for mode in ("plain", "opt-tree", "paper"):
        arguments = ["generate", PROMPTS[1], "--mode", mode, "--max-tokens", "30", "--dtype", "float32", "--json"]
        done = service.basic(*arguments)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (
            sum(step["emitted_tokens"] for step in said["steps"]) == said["completion_tokens"] == len(said["token_ids"])
        )
        texts.add(tuple(said["token_ids"]))
    assert len(texts) == 1
