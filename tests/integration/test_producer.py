from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery.contrib.testing.worker import start_worker

from jobs.celery_app import INGEST_QUEUE, INGEST_TASK, KEY_PREFIX, NOTIFY_TASK, make_app
from jobs.errors import QueueUnavailable
from jobs.ingest import make_ingest_app
from jobs.messages import PromptBatch, model_queue
from jobs.producer import batch_job_id, make_producer_app, notify_workers, push
from jobs.settings import JobsSettings
from storage import queries, schema
from storage.session import Database
from tests.conftest import free_port


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        client.delete(*client.keys(f"{KEY_PREFIX}*"))


def message_body(raw: str | bytes) -> tuple[list[object], dict[str, object]]:
    """Return the arguments in a Celery message, as any other program would read them."""
    args, kwargs, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
    return args, kwargs


def test_a_pushed_batch_waits_on_the_ingest_queue(server: redis.Redis, redis_url: str) -> None:
    batch = PromptBatch(id="nightly", requests=("Hello", {"prompt": "Bye"}), parameters={"max_tokens": 5})
    assert push(batch, redis_url) == "nightly"
    [raw] = server.lrange(f"{KEY_PREFIX}{INGEST_QUEUE}", 0, -1)
    assert json.loads(raw)["headers"]["task"] == INGEST_TASK
    assert PromptBatch.model_validate_json(json.dumps(message_body(raw)[1]["batch"])) == batch


def test_a_notification_goes_to_the_queue_of_its_model_and_carries_only_the_id(
    server: redis.Redis, redis_url: str
) -> None:
    assert notify_workers(make_producer_app(redis_url), "batch_1", "org/Tiny")
    [raw] = server.lrange(f"{KEY_PREFIX}{model_queue('org/Tiny')}", 0, -1)
    assert message_body(raw) == ([], {"job_id": "batch_1"})


def test_every_key_in_redis_starts_with_our_prefix(server: redis.Redis, redis_url: str) -> None:
    push(PromptBatch(id="one", requests=("Hello",)), redis_url)
    notify_workers(make_producer_app(redis_url), "batch_1", "tiny")
    keys = server.keys("*")
    assert keys
    assert all(str(key).startswith(KEY_PREFIX) for key in keys)


def test_push_without_a_server_raises_queue_unavailable() -> None:
    with pytest.raises(QueueUnavailable):
        push(PromptBatch(id="one", requests=("Hello",)), f"redis://127.0.0.1:{free_port()}/0")


def test_a_notification_without_a_server_is_no_error() -> None:
    assert notify_workers(make_producer_app(f"redis://127.0.0.1:{free_port()}/0"), "batch_1", "tiny") is False


def test_a_consumer_of_the_models_queue_receives_the_notification(server: redis.Redis, redis_url: str) -> None:
    heard = threading.Event()
    app = make_app(redis_url, queues=(model_queue("tiny"),))

    @app.task(name=NOTIFY_TASK)  # type: ignore[untyped-decorator]
    def notified(job_id: str) -> None:
        assert job_id == "batch_1"
        heard.set()

    with start_worker(app, pool="threads", concurrency=1, perform_ping_check=False, shutdown_timeout=60):
        notify_workers(make_producer_app(redis_url), "batch_1", "tiny")
        assert heard.wait(60)


def test_a_pushed_batch_becomes_a_job_through_the_real_ingest_worker(
    server: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    settings = JobsSettings(data_dir=tmp_path, redis_url=redis_url, target="tiny")
    schema.upgrade(settings.resolved_database_url)
    database = Database.open(settings.resolved_database_url)
    batch = PromptBatch(id="nightly", requests=("Hello", "Bye"))
    with start_worker(
        make_ingest_app(database, settings),
        pool="threads",
        concurrency=1,
        perform_ping_check=False,
        shutdown_timeout=60,
    ):
        for _ in range(2):
            push(batch, redis_url)
        notification = server.blpop([f"{KEY_PREFIX}{model_queue('tiny')}"], timeout=60)
    with database.read() as session:
        job = queries.job(session, batch_job_id("nightly"))
    database.dispose()
    assert job is not None
    assert job.requests_total == 2
    assert notification is not None
    assert server.llen(f"{KEY_PREFIX}{model_queue('tiny')}") == 0  # a batch that arrives twice notifies once
