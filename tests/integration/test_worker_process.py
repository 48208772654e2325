"""A real worker process with a tiny model: it crashes, stops, hangs or loses its queue, and its requests complete."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.celery_app import make_app
from jobs.messages import CHAT_ENDPOINT, GenerationRequest, PartialEvent, SamplingParameters, model_queue
from jobs.streaming.pubsub import channel
from storage import writes
from storage.lease_recovery import reclaim
from storage.records import NewJob, NewRequest
from tests.chaos.stack import Stack
from tests.chaos.worker import HANG, POISON, STEP_VARIABLE

MODEL = "tiny"


@pytest.fixture
def stack(tmp_path: Path, tiny_target: Path) -> Iterator[Stack]:
    """A Redis server and a database; the test starts the worker."""
    made = Stack(tmp_path / "stack", tiny_target, None, workers=1, step_s=0.01)
    yield made
    made.stop()


def submit(stack: Stack, job_id: str, *prompts: str, max_tokens: int = 30, reused: bool = False) -> None:
    sampling = SamplingParameters(seed=1, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    requests = [
        NewRequest(
            f"r{n}",
            GenerationRequest(model=MODEL, prompt=prompt, sampling=sampling).model_dump(mode="json"),
            identity=prompt if reused else None,
        )
        for n, prompt in enumerate(prompts)
    ]
    with stack.database.write() as session:
        writes.insert_job(session, NewJob(job_id, MODEL, CHAT_ENDPOINT, 3600.0), requests)


def ended(stack: Stack, job_id: str) -> bool:
    return stack.rows("SELECT status FROM jobs WHERE id = :job", job=job_id) == [("completed",)]


def rows(stack: Stack, job_id: str) -> list[tuple[Any, ...]]:
    return stack.rows(
        "SELECT status, error_code, attempts FROM requests WHERE job_id = :job ORDER BY request_index", job=job_id
    )


def text_of(stack: Stack, job_id: str) -> list[tuple[Any, ...]]:
    return stack.rows("SELECT request_index, text FROM outputs WHERE job_id = :job ORDER BY 1", job=job_id)


def test_a_prompt_that_kills_its_workers_is_failed_and_its_neighbours_are_served(stack: Stack) -> None:
    stack.start(doors=False)
    submit(stack, "job", "one", "two", POISON)

    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert [row[:2] for row in rows(stack, "job")] == [("completed", None), ("completed", None), ("failed", "poison")]
    assert stack.rows("SELECT requests_completed, requests_failed FROM jobs") == [(2, 1)]
    lost = "SELECT count(*) FROM workers WHERE lost_at IS NOT NULL"
    # Crashes: with all three, then alone twice. The last one is marked after its request has failed.
    stack.wait_for(lambda: stack.rows(lost) == [(3,)], "three lost workers")


@pytest.mark.long
def test_a_prompt_that_kills_the_only_worker_fails_even_if_no_other_request_tests_the_host(stack: Stack) -> None:
    stack.start(doors=False)
    submit(stack, "job", POISON)

    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert [row[:2] for row in rows(stack, "job")] == [("failed", "poison")]
    ((message,),) = stack.rows("SELECT error_message FROM requests")
    assert "the host may be at fault" in str(message)


def test_steps_that_outlast_their_lease_fail_no_request(stack: Stack) -> None:
    stack.environment |= {"BASIC_LEASE_S": "0.4", STEP_VARIABLE: "1.5"}
    stack.start(doors=False)
    submit(stack, "job", "one", "two", "three", max_tokens=4)

    stack.wait_for(lambda: _reclaimed(stack), "a lease that has lapsed")
    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert [row[:2] for row in rows(stack, "job")] == [("completed", None)] * 3
    assert max(attempts for _, _, attempts in rows(stack, "job")) > 1, "a lapsed lease is another attempt"


def _reclaimed(stack: Stack) -> bool:
    """Return whether a lease had lapsed, and queue its request. The reconciler's rounds may miss it."""
    with stack.database.write() as session:
        return bool(reclaim(session, lapsed=True).requeued)


def test_stopping_during_a_job_loses_no_published_token(stack: Stack) -> None:
    stack.environment |= {"BASIC_LEASE_S": "600"}  # a lease that lapses on a busy machine is another attempt
    stack.start(doors=False)
    submit(stack, "undisturbed", "one", "two")
    stack.wait_for(lambda: ended(stack, "undisturbed"), "the undisturbed job")
    published: list[PartialEvent] = []
    with stack.redis() as client, client.pubsub() as subscription:
        subscription.subscribe(channel("job"))
        submit(stack, "job", "one", "two", max_tokens=200)
        stack.wait_for(lambda: _hear(subscription, published) and published[-1].type == "tokens", "the first tokens")
        stack.down.add("worker-0")
        stack.kill("worker-0", signal.SIGTERM)
        stack.wait_for(lambda: stack.status("worker-0") is not None, "the worker's end")
        assert stack.status("worker-0") == 0
        client.publish(channel("job"), PartialEvent(job_id="job", type="job").model_dump_json())
        stack.wait_for(lambda: _hear(subscription, published) and published[-1].type == "job", "the last message")

    told = {index: sum(e.tokens for e in published if e.index == index) for index in (0, 1)}
    partials = stack.rows("SELECT request_index, sum(json_array_length(token_ids)) FROM partials GROUP BY 1")
    kept: dict[Any, Any] = {row[0]: row[1] for row in partials}
    assert told == kept
    assert rows(stack, "job") == [("queued", None, 0), ("queued", None, 0)]
    assert stack.rows("SELECT count(*) FROM workers WHERE stopped_at IS NOT NULL") == [(1,)]
    assert stack.rows("SELECT target FROM speculation_states") == [(MODEL,)], "the next worker starts with it"

    stack.down.clear()
    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")
    begun = {index: str(text) for index, text in text_of(stack, "undisturbed")}
    assert all(str(text).startswith(begun[index]) for index, text in text_of(stack, "job"))
    assert rows(stack, "job") == [("completed", None, 1), ("completed", None, 1)]


def _hear(subscription: Any, published: list[PartialEvent]) -> bool:
    """Receive one message; return whether there was one."""
    message = subscription.get_message(timeout=0.5)
    if message is None or message["type"] != "message":
        return False
    published.append(PartialEvent.model_validate_json(message["data"]))
    return True


def test_a_second_signal_stops_at_once_and_sighup_is_ignored(stack: Stack) -> None:
    stack.environment |= {STEP_VARIABLE: "600"}
    stack.start(doors=False)
    submit(stack, "job", "one")
    stack.wait_for(lambda: rows(stack, "job")[0][0] == "running", "the claim")
    log = stack.directory / "worker-0.log"
    stack.wait_for(lambda: "ready" in log.read_text(), "Celery")
    stack.down.add("worker-0")
    stack.rest(0.5)

    stack.kill("worker-0", signal.SIGHUP)
    stack.rest(0.5)
    assert stack.status("worker-0") is None
    asked_at = time.monotonic()
    stack.kill("worker-0", signal.SIGTERM)
    while stack.status("worker-0") is None and time.monotonic() - asked_at < 60:  # a drain ends with status 0
        stack.rest(0.2)
        stack.kill("worker-0", signal.SIGTERM)
    assert stack.status("worker-0") == 128 + signal.SIGTERM


def test_an_engine_that_hangs_lets_its_leases_lapse_and_its_process_ends(stack: Stack) -> None:
    stack.environment |= {"BASIC_STALL_S": "3"}
    stack.start(doors=False)
    stack.down.add("worker-0")
    submit(stack, "job", HANG)

    stack.wait_for(lambda: stack.status("worker-0") is not None, "the watchdog")

    assert stack.status("worker-0") == 75
    assert "has not finished a step" in (stack.directory / "worker-0.log").read_text()


def test_a_worker_that_receives_no_messages_restarts_and_serves_its_jobs_meanwhile(stack: Stack) -> None:
    stack.environment |= {"BASIC_DEAF_S": "10"}
    stack.start(doors=False)
    stack.wait_for(lambda: "ready" in (stack.directory / "worker-0.log").read_text(), "Celery")
    stack.down.add("worker-0")
    app = make_app(stack.redis_url)
    ((worker,),) = stack.rows("SELECT id FROM workers")
    for queue in (model_queue(MODEL), f"basic.pulse.{worker}"):
        app.control.cancel_consumer(queue)  # it still runs and is connected, but consumes nothing
    submit(stack, "job", "one")
    stack.wait_for(lambda: ended(stack, "job"), "the job")  # the engine polls SQL

    stack.wait_for(lambda: stack.status("worker-0") is not None, "the watchdog")
    assert stack.status("worker-0") == 75
    assert "no message has arrived from Redis" in (stack.directory / "worker-0.log").read_text()


@pytest.mark.long
def test_equal_requests_are_decoded_once_over_the_death_of_their_worker(stack: Stack) -> None:
    stack.environment |= {"BASIC_CACHE": "on"}
    stack.start(doors=False)
    submit(stack, "undisturbed", "one", max_tokens=200)
    stack.wait_for(lambda: ended(stack, "undisturbed"), "the undisturbed job")
    submit(stack, "job", *["one"] * 3, max_tokens=200, reused=True)
    submit(stack, "another", *["one"] * 2, max_tokens=200, reused=True)
    stack.wait_for(lambda: stack.rows("SELECT count(*) FROM partials WHERE seq > 1") != [(0,)], "tokens of one of them")
    stack.kill("worker-0", signal.SIGKILL)

    stack.wait_for(lambda: ended(stack, "job") and ended(stack, "another"), "the end of both jobs")

    assert stack.rows("SELECT sum(requests_cached) FROM jobs") == [(4,)]
    texts = [text for job_id in ("undisturbed", "job", "another") for _, text in text_of(stack, job_id)]
    assert len(texts) == 6
    assert len(set(texts)) == 1
