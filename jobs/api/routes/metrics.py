"""`/metrics` for Prometheus: queue and workers from the database, and the latency of this API server.

The database is read at most once every few seconds. API servers that share a database report the same values for it:
aggregate them with max, not sum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api.schemas.openapi import ERRORS
from storage import queue_stats
from storage.queue_stats import QueueStats, WorkerLoad
from storage.session import Database

router = APIRouter(tags=["service"], responses=ERRORS)

_MAX_AGE_S: Final = 3.0
_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one API server."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_DatabaseCollector(database))
        self._latency = Histogram(
            "basic_http_request_seconds",
            "Time to the first byte of the response.",
            ("method", "route", "status"),
            registry=self.registry,
            buckets=_BUCKETS_S,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record the time to the first byte of a response."""
        self._latency.labels(method, route, str(status)).observe(seconds)


class LatencyMiddleware:
    """Measures the time to the first byte of responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record when its response starts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                seconds = time.perf_counter() - started
                self._metrics.observe(_method(scope), _route(scope), message["status"], seconds)
            await send(message)

        await self._app(scope, receive, timed)


# Clients choose method and path: as labels, both must come from a fixed set.
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    """Return the pattern of the route, not the path."""
    return str(getattr(scope.get("route"), "path", "other"))


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Return all metrics of this API server in Prometheus' text format."""
    registry = cast(Metrics, request.app.state.metrics).registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _DatabaseCollector(Collector):
    """Metrics from the database, cached for `_MAX_AGE_S`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._stats: QueueStats | None = None
        self._read_at = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registration must not read the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of a snapshot that is at most `_MAX_AGE_S` old."""
        stats = self._read()
        yield from _queue(stats)
        yield from _totals(stats)
        yield from _worker_gauges(stats.workers)
        yield from _worker_counters(stats.workers)

    def _read(self) -> QueueStats:
        with self._lock:
            if self._stats is None or time.monotonic() - self._read_at > _MAX_AGE_S:
                with self._database.read() as session:
                    self._stats = queue_stats.collect(session)
                self._read_at = time.monotonic()
            return self._stats


def _queue(stats: QueueStats) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("basic_jobs_open", "Jobs that have not ended.", labels=["model"])
    requests = GaugeMetricFamily(
        "basic_requests_open", "Requests that are queued, running, or of paused jobs.", labels=["model", "status"]
    )
    leases = GaugeMetricFamily("basic_leases", "Leases of workers on requests: held or lapsed.", labels=["state"])
    age = GaugeMetricFamily(
        "basic_oldest_open_job_seconds", "Age of the oldest job that has not ended.", labels=["model"]
    )
    for model in stats.open_jobs:
        jobs.add_metric([model.model], model.jobs)
        requests.add_metric([model.model, "queued"], model.queued)
        requests.add_metric([model.model, "running"], model.running)
        requests.add_metric([model.model, "paused"], model.paused)
        age.add_metric([model.model], model.oldest_s)
    leases.add_metric(["held"], stats.leases_held)
    leases.add_metric(["lapsed"], stats.leases_lapsed)
    deliveries = GaugeMetricFamily(
        "basic_webhook_deliveries",
        "Events for webhooks: pending (they wait for their next attempt) or dead (they are not tried any more).",
        labels=["status"],
    )
    for status in ("pending", "dead"):
        deliveries.add_metric([status], stats.deliveries[status])
    yield from (jobs, requests, leases, age, deliveries)


def _totals(stats: QueueStats) -> Iterator[Metric]:
    ended = CounterMetricFamily("basic_requests_ended", "Requests that have ended.", labels=["model", "outcome"])
    tokens = CounterMetricFamily("basic_tokens", "Computed prompt and completion tokens.", labels=["model", "kind"])
    cached = CounterMetricFamily("basic_requests_cached", "Requests answered by copies.", labels=["model"])
    copied = CounterMetricFamily("basic_cached_tokens", "Tokens of copied answers.", labels=["model", "kind"])
    for model in stats.totals:
        ended.add_metric([model.model, "completed"], model.requests_completed)
        ended.add_metric([model.model, "failed"], model.requests_failed)
        tokens.add_metric([model.model, "prompt"], model.prompt_tokens - model.cached_prompt_tokens)
        tokens.add_metric([model.model, "completion"], model.completion_tokens - model.cached_completion_tokens)
        cached.add_metric([model.model], model.requests_cached)
        copied.add_metric([model.model, "prompt"], model.cached_prompt_tokens)
        copied.add_metric([model.model, "completion"], model.cached_completion_tokens)
    errors = CounterMetricFamily("basic_request_errors", "Requests without a result, by error code.", labels=["code"])
    for code, count in stats.errors:
        errors.add_metric([code], count)
    yield from (ended, tokens, cached, copied, errors)


_GAUGES: Final[tuple[tuple[str, str, str], ...]] = (
    ("sequences", "basic_worker_sequences", "Sequences being decoded together."),
    ("waiting_sequences", "basic_worker_waiting_sequences", "Sequences that wait for a slot in the batch."),
    ("max_sequences", "basic_worker_max_sequences", "Maximum number of sequences decoded together."),
    ("kv_tokens", "basic_worker_kv_tokens", "KV entries in use, in tokens."),
    ("kv_capacity_tokens", "basic_worker_kv_capacity_tokens", "KV capacity, in tokens."),
)
_COUNTERS: Final[tuple[tuple[str, str, str], ...]] = (
    ("tokens", "basic_worker_tokens", "Tokens emitted."),
    (
        "batch_sequences",
        "basic_worker_batch_sequences",
        "Sequences summed over steps; divided by steps: the mean batch size.",
    ),
    ("tree_nodes", "basic_worker_draft_tokens_shown", "Draft tokens verified by the target."),
    ("accepted_tokens", "basic_worker_draft_tokens_accepted", "Draft tokens accepted."),
    ("expected_accepted", "basic_worker_draft_tokens_expected", "Draft tokens expected to be accepted."),
    ("preemptions", "basic_worker_preemptions", "Times that a sequence lost its KV memory and had to wait."),
    ("recomputed_tokens", "basic_worker_recomputed_tokens", "Tokens that were prefilled again after a preemption."),
    ("joules", "basic_worker_joules", "Energy used by the worker's GPUs, where it can be measured."),
)


def _worker_gauges(workers: Iterable[WorkerLoad]) -> Iterator[Metric]:
    alive = GaugeMetricFamily("basic_worker_up", "Workers that are alive.", labels=["worker", "model", "hostname"])
    for worker in workers:
        alive.add_metric([worker.id, worker.model, worker.hostname], 1)
    yield alive
    for field, name, help_text in _GAUGES:
        yield _fill(GaugeMetricFamily(name, help_text, labels=["worker"]), workers, _field(field))


def _worker_counters(workers: Iterable[WorkerLoad]) -> Iterator[Metric]:
    for field, name, help_text in _COUNTERS:
        yield _fill(CounterMetricFamily(name, help_text, labels=["worker"]), workers, _field(field))
    steps = CounterMetricFamily(
        "basic_worker_steps", "Decoding steps, by speculation decision.", labels=["worker", "decision"]
    )
    seconds = CounterMetricFamily(
        "basic_worker_seconds", "Time of decoding steps, by phase.", labels=["worker", "phase"]
    )
    for worker in workers:
        for decision, count in worker.load.get("steps", {}).items():
            steps.add_metric([worker.id, decision], count)
        for phase, milliseconds in _phases(worker.load).items():
            seconds.add_metric([worker.id, phase], milliseconds / 1000)
    yield from (steps, seconds)


def _field(name: str) -> Callable[[WorkerLoad], float | None]:
    return lambda worker: worker.load.get(name)


def _fill(family: Any, workers: Iterable[WorkerLoad], value: Callable[[WorkerLoad], float | None]) -> Metric:
    for worker in workers:
        if (found := value(worker)) is not None:
            family.add_metric([worker.id], found)
    return cast(Metric, family)


def _phases(load: Any) -> dict[str, float]:
    if "step_ms" not in load:
        return {}
    draft, verify = load["draft_ms"], load["verify_ms"]
    return {"draft": draft, "verify": verify, "host": max(0.0, load["step_ms"] - draft - verify)}
