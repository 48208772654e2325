"""`python -m tests.load`: measure the constants of docs/scale.md on this machine, with real servers on loopback.

Notifications through Celery, claims and step rows through the storage functions of workers, partial events through
pub/sub: each alone, in one process. Print JSON.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from celery.contrib.testing.worker import start_worker
from sqlalchemy import func, select, text

from jobs.celery_app import NOTIFY_TASK, make_app
from jobs.messages import PartialEvent, model_queue
from jobs.producer import make_producer_app, notify_workers
from jobs.streaming.pubsub import channel
from storage.models import DecodeStep
from storage.records import RequestProgress
from storage.session import Database
from tests.conftest import free_port, start_redis, stop
from tests.databases import on_postgresql, on_sqlite
from tests.factories import a_checkpoint, a_finished_choice, some_steps
from tests.postgres import Postgres
from tests.unit.storage.acts import claim, flush, record

BELLS = 500
REQUESTS = 192
STEPS = 100  # of each request
TOKENS = 2 * STEPS - 1
AT_ONCE = 64  # requests in one flush, as many as a worker holds
EVENTS = 5_000
JOB, WORKER = "batch_" + "5" * 32, "worker-" + "7" * 32  # as long as real ids, which are in every row


def timed(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def doorbells(redis_url: str) -> dict[str, float]:
    """Send notifications, then receive them with a worker's Celery app that does nothing else."""
    app = make_producer_app(redis_url)
    sent_s = timed(lambda: [notify_workers(app, f"job-{number}", "load") for number in range(BELLS)])
    heard, all_heard = [0], threading.Event()
    consumer = make_app(redis_url, queues=(model_queue("load"),))

    @consumer.task(name=NOTIFY_TASK)  # type: ignore[untyped-decorator]
    def doorbell(job_id: str) -> None:
        heard[0] += 1
        if heard[0] == BELLS:
            all_heard.set()

    started = time.perf_counter()
    with start_worker(consumer, pool="threads", concurrency=4, perform_ping_check=False):
        all_heard.wait(300)
        heard_s = time.perf_counter() - started
    return {"sent_per_s": BELLS / sent_s, "heard_per_s": heard[0] / heard_s}


def rows(database: Database) -> dict[str, float]:
    """Claim requests and write their outputs and step rows, `AT_ONCE` requests per transaction."""
    record(database, JOB, requests=REQUESTS)
    before = size(database)
    claimed_s = written_s = 0.0
    for _ in range(0, REQUESTS, AT_ONCE):
        started = time.perf_counter()
        claims = claim(database, WORKER, AT_ONCE)
        claimed_s += time.perf_counter() - started
        steps = some_steps(1, *[2] * (STEPS - 1))
        progress = [
            RequestProgress(
                lease=claimed.lease,
                checkpoints=(a_checkpoint("Hi " * STEPS, token_ids=(7,) * TOKENS, steps=steps),),
                finished=(a_finished_choice("Hi " * STEPS, token_ids=(7,) * TOKENS, completion_tokens=TOKENS),),
                ends=True,
            )
            for claimed in claims
        ]
        started = time.perf_counter()
        flush(database, WORKER, *progress)
        written_s += time.perf_counter() - started
    with database.read() as session:
        written = int(session.scalar(select(func.count()).select_from(DecodeStep)) or 0)
    return {
        "claims_per_s": REQUESTS / claimed_s,
        "step_rows_per_s": written / written_s,
        "bytes_per_step_row": (size(database) - before) / written,
    }


def size(database: Database) -> float:
    """Return the size of the packed steps and their index, in bytes."""
    if database.engine.dialect.name == "postgresql":
        query = text("SELECT pg_total_relation_size('packed_steps')")
    else:
        query = text("SELECT sum(pgsize) FROM dbstat WHERE name LIKE '%packed_steps%'")
    with database.read() as session:
        return float(session.scalar(query) or 0)


def partials(redis_url: str) -> dict[str, float]:
    """Publish events to one reader in batches of a hundred, as a worker does."""
    event = PartialEvent(
        job_id=JOB, request="request-17", index=17, seq=3, type="tokens", text="a few more words of text", tokens=6
    )
    body = event.model_dump_json(exclude_defaults=True)
    client, got = redis.Redis.from_url(redis_url), [0]
    with client.pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.subscribe(channel(JOB))
        subscription.get_message(timeout=5)

        def read() -> None:
            while got[0] < EVENTS:
                got[0] += subscription.get_message(timeout=10) is not None

        reader = threading.Thread(target=read)
        reader.start()
        started = time.perf_counter()
        for _ in range(0, EVENTS, 100):
            with client.pipeline(transaction=False) as pipe:
                for _ in range(100):
                    pipe.publish(channel(JOB), body)
                pipe.execute()
        published_s = time.perf_counter() - started
        reader.join()
        read_s = time.perf_counter() - started
    return {"published_per_s": EVENTS / published_s, "read_per_s": EVENTS / read_s, "bytes_per_event": len(body)}


def main() -> None:
    said: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = start_redis(port, Path(folder))
        try:
            url = f"redis://127.0.0.1:{port}/0"
            said |= {"doorbells": doorbells(url), "partials": partials(url)}
        finally:
            stop(server)
        with on_sqlite(Path(folder)) as database:
            said["sqlite"] = rows(database)
    postgres = Postgres()
    postgres.start()
    try:
        with on_postgresql(postgres.create("load")) as database:
            said["postgresql"] = rows(database)
    finally:
        postgres.remove()
    said["load_after"] = os.getloadavg()[0]
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
