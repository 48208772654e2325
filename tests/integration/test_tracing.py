"""Traces from submission to output, as a collector receives them over HTTP. Without a collector nothing is loaded."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from sqlalchemy import select

from jobs.api.app import make_api
from jobs.batch_files.processor import BatchFileProcessor
from jobs.messages import PromptBatch
from jobs.producer import batch_job_id, push
from jobs.settings import JobsSettings
from jobs.tracing import as_traceparent, start_tracing, stop_tracing
from storage import schema
from storage.models import JobRow
from storage.session import Database
from tests.conftest import free_port
from tests.unit.worker.serving.test_runner import MODEL, Worker

STRANGER = f"00-{'ab' * 16}-{'cd' * 8}-01"


@dataclass
class Collector:
    """An OTLP collector that keeps all spans."""

    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(names["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        start_tracing("basic-test")
        yield collector
        stop_tracing()
        server.shutdown()


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> JobsSettings:
    return JobsSettings(data_dir=tmp_path, redis_url=redis_url, target=MODEL)


@pytest.fixture
def database(settings: JobsSettings) -> Iterator[Database]:
    schema.upgrade(settings.resolved_database_url)
    database = Database.open(settings.resolved_database_url)
    yield database
    database.dispose()


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    with TestClient(make_api(settings, database, notify=lambda job_id, model: True)) as client:
        yield client


def attributes(span: Span) -> dict[str, object]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def finish(database: Database) -> None:
    """Run the requests like a worker, and wait until the collector has all spans."""
    Worker(database, "a").run()
    stop_tracing()


def check_chain(collector: Collector, requests: int, *, below: str = "ingest") -> None:
    """Assert that all spans are one trace: the submission, below it the job, and below that each request."""
    assert len({span.trace_id for span in collector.spans}) == 1
    submit, ingest = collector.one("submit"), collector.one("ingest")
    assert ingest.parent_span_id == submit.span_id
    for name in ("claim", "decode", "output"):
        spans = collector.named(name)
        assert {span.parent_span_id for span in spans} == {collector.one(below).span_id}
        assert sorted(int(str(attributes(span)["basic.request_index"])) for span in spans) == list(range(requests))
        assert {attributes(span)["basic.job_id"] for span in spans} == {attributes(ingest)["basic.job_id"]}
    assert all(0 < span.start_time_unix_nano <= span.end_time_unix_nano for span in collector.spans)


def test_a_job_over_http_is_one_trace_from_submission_to_output(
    collector: Collector, api: TestClient, database: Database
) -> None:
    requests = {"requests": ["one", "two"], "max_tokens": 20, "temperature": 0}
    job_id = api.post("/v1/jobs", json=requests, headers={"traceparent": STRANGER}).json()["id"]
    finish(database)

    check_chain(collector, requests=2)
    submit = collector.one("submit")
    assert (submit.trace_id.hex(), submit.parent_span_id.hex()) == ("ab" * 16, "cd" * 8)
    assert attributes(collector.one("ingest"))["basic.job_id"] == job_id
    assert {attributes(span)["basic.completion_tokens"] for span in collector.named("decode")} == {20}
    first, last = collector.one("ingest").start_time_unix_nano, collector.named("output")[0].end_time_unix_nano
    assert all(first <= span.start_time_unix_nano < last for span in collector.named("decode"))
    assert collector.services == {"basic-test"}


def test_a_batch_that_a_producer_pushed_is_one_trace_too(
    collector: Collector, settings: JobsSettings, database: Database
) -> None:
    batch = PromptBatch(id="nightly", requests=("one",), parameters={"max_tokens": 5})
    push(batch, settings.redis_url)
    ours = {"BASIC_DATA_DIR": settings.data_dir, "BASIC_REDIS_URL": settings.redis_url, "BASIC_TARGET": MODEL}
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.ingest"], env=os.environ | {name: str(value) for name, value in ours.items()}
    ) as ingest:
        try:
            wait_for_job(database, batch_job_id("nightly"))
        finally:
            ingest.terminate()
    finish(database)

    check_chain(collector, requests=1)
    assert attributes(collector.one("submit"))["basic.batch_id"] == "nightly"
    assert collector.services == {"basic-test", "basic-ingest"}


def wait_for_job(database: Database, job_id: str) -> None:
    waiting = threading.Event()
    for _ in range(4_800):
        with database.read() as session:
            if session.scalar(select(JobRow.id).where(JobRow.id == job_id)) is not None:
                return
        waiting.wait(0.05)
    raise AssertionError("the batch was never recorded")


def test_a_batch_of_a_file_is_one_trace_too(
    collector: Collector, api: TestClient, settings: JobsSettings, database: Database
) -> None:
    body = f'{{"model": "{MODEL}", "max_tokens": 5, "messages": [{{"role": "user", "content": "one"}}]}}'
    line = f'{{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}'
    file = api.post("/v1/files", files={"file": ("batch.jsonl", line)}, data={"purpose": "batch"}).json()
    order = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert api.post("/v1/batches", json=order).status_code == 200
    assert BatchFileProcessor(database, settings, lambda job_id, model: True, lambda events: None).run_once()
    finish(database)

    check_chain(collector, requests=1, below="submit")


def test_a_request_that_fails_says_why_in_its_span(collector: Collector, api: TestClient, database: Database) -> None:
    api.post("/v1/jobs", json={"requests": ["x" * 500]})
    finish(database)
    assert attributes(collector.one("decode"))["basic.error_code"] == "context_length_exceeded"


def test_a_collector_that_is_down_delays_no_exit() -> None:
    code = (
        "from jobs.tracing import span, start_tracing; start_tracing('x')\n"
        "with span('submit') as place: assert place is not None\n"
        "import time; print(time.monotonic())"
    )
    env = without_otel() | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert time.monotonic() - float(done.stdout) < 25, "the library alone would take 30 s"


@pytest.mark.parametrize(
    "sent", [None, "", "00-1-2-01", STRANGER.upper(), f"00-{'0' * 32}-{'cd' * 8}-01", STRANGER + "\n", STRANGER + "0"]
)
def test_an_invalid_traceparent_is_ignored(sent: str | None) -> None:
    assert as_traceparent(sent) is None
    assert as_traceparent(STRANGER) == STRANGER


def test_without_a_collector_no_traceparent_is_stored(api: TestClient, database: Database) -> None:
    api.post("/v1/jobs", json={"requests": ["one"]})
    with database.read() as session:
        assert session.scalar(select(JobRow.traceparent)) is None


# redis, FastAPI and transformers import parts of OpenTelemetry if installed, but never an exporter.
@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [("jobs.client", "opentelemetry"), ("jobs.api.app, worker.serving.requests.spans", "opentelemetry.exporter")],
)
def test_without_a_collector_nothing_is_loaded(modules: str, unwanted: str) -> None:
    code = (
        f"from jobs.tracing import span, start_tracing; import sys, {modules}\n"
        "start_tracing('x')\n"
        "with span('submit') as place: assert place is None\n"
        f"print([name for name in sys.modules if name.startswith({unwanted!r})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=without_otel())
    assert done.stdout.strip() == "[]"


def test_a_collector_without_the_extra_is_logged_and_stops_nothing(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['opentelemetry.sdk.resources'] = None"
    code = f"{hidden}; from jobs.tracing import start_tracing, tracing; start_tracing('x'); print(tracing())"
    env = without_otel() | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "False"
    assert "pip install 'basic-batch[otel]'" in done.stderr


def without_otel() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
