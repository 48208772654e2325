"""Check every part of an installation and report problems with advice, for `basic doctor`. Changes nothing.

A part that does not answer is a finding, not an error. Checks of models and GPUs come from other packages through the
entry points `basic.checks`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from jobs.errors import BasicError
from jobs.local.state import running_service
from jobs.logs import without_secrets
from jobs.schema_check import explain_database_errors
from jobs.settings import JobsSettings
from jobs.upkeep.import_names import shared_names
from storage import queries, schema, webhooks
from storage.dialect import database_now
from storage.health import Health, health
from storage.queries import WorkerView
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.settings import sqlite_file
from storage.webhooks import DeadDeliveries

Status = Literal["ok", "warning", "problem"]

_MIN_FREE_BYTES = 1_000_000_000
_MAX_CLOCK_DIFFERENCE_S = 5.0  # leases use one clock, but times in logs and tables would contradict each other
_TIMEOUT_S = 3.0
_STUCK_S = 300.0  # requests queued for longer are stuck, if a worker of their model is alive and has free slots


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do about it."""

    part: str
    status: Status
    message: str
    advice: str = ""


Check = Callable[[JobsSettings], Iterable[Finding]]


def examine(settings: JobsSettings) -> list[Finding]:
    """Check the installation with these settings; if `basic up` runs on its data directory, check that service."""
    settings = _with_running_service(settings)
    checks: list[tuple[str, Check]] = [
        ("import names", _import_names),
        ("disk", _disk),
        ("redis", _redis),
        ("database", _database),
        ("API server", _api_server),
        *((entry.name, _lazy_check(entry.load)) for entry in entry_points(group="basic.checks")),
    ]
    found = [finding for part, check in checks for finding in _run_check(part, check, settings)]
    return [replace(f, message=without_secrets(f.message), advice=without_secrets(f.advice)) for f in found]


def _with_running_service(settings: JobsSettings) -> JobsSettings:
    """Return the settings with the addresses of the service that runs on this data directory, if any."""
    service = running_service(settings.data_dir)
    if service is None:
        return settings
    update: dict[str, Any] = {"redis_url": service.redis_url, "api_url": service.api_url}
    return settings.model_copy(update={**update, "database_url": service.database_url})


def _lazy_check(load: Callable[[], Check]) -> Check:
    def check(settings: JobsSettings) -> Iterable[Finding]:
        return load()(settings)

    return check


def _run_check(part: str, check: Check, settings: JobsSettings) -> list[Finding]:
    """Run a check. If the check itself fails, that is a finding."""
    try:
        return list(check(settings))
    except ModuleNotFoundError as exc:
        return [Finding(part, "warning", f"not checked: {exc.name} is not installed")]
    except Exception as exc:  # a broken check must not hide the other findings
        return [Finding(part, "problem", f"the check failed: {type(exc).__name__}: {exc}", "report this as a bug")]


def _import_names(_: JobsSettings) -> Iterator[Finding]:
    shared = list(shared_names())
    for name, others in shared:
        advice = f"install {others} into another environment; clients can import basic_batch instead of jobs"
        yield Finding("import names", "problem", f"{others} also installs a top-level package {name!r}", advice)
    if not shared:
        yield Finding("import names", "ok", "no other distribution has packages named jobs, storage or worker")


def _disk(settings: JobsSettings) -> Iterator[Finding]:
    directory = settings.data_dir.expanduser()
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    statistics = os.statvfs(existing)
    free = statistics.f_bavail * statistics.f_frsize
    sentence = f"{free / 1e9:.1f} GB free at {directory}"
    if not os.access(existing, os.W_OK):
        yield Finding("disk", "problem", f"{existing} can't be written", "set BASIC_DATA_DIR to a writable directory")
    elif free < _MIN_FREE_BYTES:
        advice = "free some space, delete old rows with: basic db prune, or set BASIC_DATA_DIR to another disk"
        yield Finding("disk", "problem", sentence, advice)
    else:
        yield Finding("disk", "ok", sentence)


def _redis(settings: JobsSettings) -> Iterator[Finding]:
    try:
        with redis.Redis.from_url(
            settings.redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, decode_responses=True
        ) as client:
            info: dict[str, Any] = client.info()
            policy = _policy(client)
    except (RedisError, OSError, ValueError) as exc:
        advice = "start the server (basic up brings its own), or set BASIC_REDIS_URL; jobs are still accepted"
        yield Finding("redis", "problem", f"no answer at {settings.redis_url}: {exc}", advice)
        return
    yield Finding("redis", "ok", f"{info.get('redis_version')} answers at {settings.redis_url}")
    yield from _redis_memory(info, policy)
    if not info.get("aof_enabled") and not info.get("rdb_last_save_time"):
        yield _WITHOUT_PERSISTENCE
    elif not info.get("aof_enabled"):
        yield Finding(
            "redis persistence",
            "warning",
            "snapshots only: pushed batches of the last minutes would be lost in a crash",
            "start the server with --appendonly yes",
        )
    else:
        yield Finding("redis persistence", "ok", "append-only file")


_WITHOUT_PERSISTENCE = Finding(
    "redis persistence",
    "warning",
    "none: pushed batches that are not in SQL yet would be lost in a crash",
    "start the server with --appendonly yes; jobs accepted over HTTP are safe in SQL",
)


def _policy(client: redis.Redis) -> str | None:
    try:
        policies: Any = client.config_get("maxmemory-policy")
    except RedisError:  # hosted servers often refuse CONFIG
        return None
    return str(policies.get("maxmemory-policy"))


def _redis_memory(info: dict[str, Any], policy: str | None) -> Iterator[Finding]:
    if policy is None:
        yield Finding("redis memory", "warning", "maxmemory-policy can't be read", "make sure that it is noeviction")
    elif policy != "noeviction":
        advice = "run: redis-cli config set maxmemory-policy noeviction, and set it in the server's configuration"
        yield Finding("redis memory", "problem", f"maxmemory-policy is {policy}: the server may drop messages", advice)
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    if limit and used > 0.9 * limit:
        advice = "raise maxmemory; while it is reached, doorbells are lost and workers look into SQL instead"
        yield Finding("redis memory", "problem", f"{used:,} of {limit:,} bytes are used", advice)
    elif policy == "noeviction":
        yield Finding("redis memory", "ok", f"{used:,} bytes used, no eviction")


def _database(settings: JobsSettings) -> Iterator[Finding]:
    url = settings.resolved_database_url
    file = sqlite_file(url)
    if file is not None and not file.exists():
        yield Finding("database", "problem", f"there is no {file}", "make it with: basic db upgrade, or basic up")
        return
    try:
        with explain_database_errors(url):
            database = Database.open(url)
    except BasicError as exc:
        yield Finding("database", "problem", str(exc), "correct the URL, or install its driver")
        return
    try:
        began_at = time.monotonic()
        with database.read() as session:
            session.execute(text("SELECT 1"))
            clock_s = database_now(session) - time.time()
        took_ms = (time.monotonic() - began_at) * 1e3
        yield Finding("database", "ok", f"{database.engine.dialect.name} answers in {took_ms:.0f} ms")
        yield from _clock(clock_s)
        finding = _migrations(url)
        yield finding
        if finding.status != "problem":
            with database.read() as session:
                yield from _work(health(session, _STUCK_S), settings)
                yield from _capacities(queries.workers(session))
                yield from _webhooks(webhooks.dead_deliveries(session))
    except (*DATABASE_UNAVAILABLE, SQLAlchemyError) as exc:
        advice = "start the database, or set BASIC_DATABASE_URL; the service answers 503 until it is available again"
        yield Finding("database", "problem", f"no answer: {unavailable_reason(exc)}", advice)
    finally:
        database.dispose()


def _clock(difference_s: float) -> Iterator[Finding]:
    if abs(difference_s) > _MAX_CLOCK_DIFFERENCE_S:
        advice = "synchronize both machines with a time server (chrony or systemd-timesyncd)"
        yield Finding("clock", "warning", f"the database's clock is {difference_s:+.1f} s from this machine's", advice)
    else:
        yield Finding("clock", "ok", f"within {abs(difference_s):.1f} s of the database's")


def _migrations(url: str) -> Finding:
    current, head = schema.current(url), schema.head()
    if current == head and schema.has_unpacked_steps(url):
        return Finding("migrations", "warning", "decoding steps of an earlier version wait", "run: basic db upgrade")
    if current == head:
        return Finding("migrations", "ok", f"at revision {head}")
    if current is None:
        return Finding("migrations", "problem", "the database has no schema", "make it with: basic db upgrade")
    if schema.is_known(current):
        return Finding("migrations", "problem", f"at revision {current}, not {head}", "run: basic db upgrade")
    return Finding("migrations", "warning", f"at revision {current}, of a newer version", "upgrade this installation")


def _work(seen: Health, settings: JobsSettings) -> Iterator[Finding]:
    """Yield findings about workers and jobs."""
    if seen.alive:
        served = ", ".join(f"{count} of {model}" for model, count in sorted(seen.alive.items()))
        yield Finding("workers", "ok", f"alive: {served}")
    else:
        yield Finding("workers", "warning", "none is alive", "start one with: basic worker, or all with: basic up")
    if seen.lost_lately:
        advice = "see logs/worker.log in the data directory; their requests were returned to the queue"
        yield Finding("workers", "warning", f"{seen.lost_lately} were lost within the last hour", advice)
    for model in sorted(seen.unserved):
        advice = f"start a worker with BASIC_TARGET={model}, or cancel its jobs"
        yield Finding(
            "jobs", "problem", f"{seen.unserved[model]} jobs wait for {model}, which no worker serves", advice
        )
    if seen.stuck:
        advice = "see the worker's log; restarting the worker loses nothing"
        yield Finding(
            "jobs", "problem", f"stuck, although their workers are alive: {', '.join(seen.stuck[:5])}", advice
        )
    if seen.lapsed:
        advice = "a running worker or API server returns them to the queue within seconds; is one running?"
        yield Finding(
            "jobs", "warning", f"{seen.lapsed} requests have a worker that no longer renews their lease", advice
        )
    if seen.poisoned:
        advice = (
            "list them with SELECT job_id, request_index FROM requests WHERE error_code = 'poison'; submit each alone"
        )
        yield Finding("jobs", "warning", f"{seen.poisoned} requests crashed their workers within the last day", advice)
    if not (seen.unserved or seen.stuck or seen.lapsed or seen.poisoned):
        yield Finding("jobs", "ok", f"{seen.open_jobs} open, {seen.open_requests} requests in total")
    if seen.open_requests > 0.9 * settings.max_requests_queued:
        advice = "raise BASIC_MAX_REQUESTS_QUEUED, or add workers"
        yield Finding(
            "jobs", "warning", f"{seen.open_requests} requests are queued; new jobs will get 429 soon", advice
        )


def _capacities(workers: Iterable[WorkerView]) -> Iterator[Finding]:
    """Yield what each live worker can hold, as it chose at its start."""
    for worker in workers:
        load = worker.load or {}
        if worker.stopped_at is None and worker.lost_at is None and "kv_capacity_tokens" in load:
            name = f"{worker.target} on {worker.hostname}, process {worker.pid}"
            held = f"{load['kv_capacity_tokens']:,d} KV tokens, up to {load['max_sequences']:,d} sequences"
            yield Finding("capacity", "ok", f"{name}: {held} of up to {worker.context_tokens:,d} tokens")


def _webhooks(dead: Iterable[DeadDeliveries]) -> Iterator[Finding]:
    """Yield the endpoints that did not take their events."""
    for endpoint in dead:
        host = urlsplit(endpoint.url).hostname  # the rest of a URL may hold a secret
        message = f"{endpoint.endpoint_id} at {host} did not take {endpoint.count:,d} events: they are dead"
        advice = (
            f"see why with: basic webhooks deliveries {endpoint.endpoint_id} --dead; then basic webhooks redeliver "
            f"EVENT sends one again, and basic webhooks rm {endpoint.endpoint_id} removes an address that is gone"
        )
        yield Finding("webhooks", "warning", message, advice)


def _api_server(settings: JobsSettings) -> Iterator[Finding]:
    try:
        reply = httpx.get(f"{settings.api_url}/healthz", timeout=_TIMEOUT_S, trust_env=False)
    except httpx.TransportError:
        yield Finding(
            "API server", "warning", f"no answer at {settings.api_url}", "start it with: basic api, or basic up"
        )
        return
    if reply.is_success:
        yield Finding("API server", "ok", f"answers at {settings.api_url}")
    else:
        yield Finding("API server", "problem", f"{settings.api_url} answers {reply.status_code}", "see its log")


__all__ = ["Finding", "examine"]
