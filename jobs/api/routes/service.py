"""Routes about the service itself: statistics, workers, models and health."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import redis
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from sqlalchemy import text

from jobs.api.auth.caller import CurrentCaller
from jobs.api.dependencies import CurrentServices
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import ERRORS
from jobs.api.schemas.route_responses import HEALTH, JOB_ROWS, MODEL, MODELS, NUMERICS, READY, STATISTICS, WORKERS
from jobs.errors import NotFound
from jobs.submission.models import known_models
from storage import numerics, queries
from storage.statistics import job_summaries

router = APIRouter(tags=["service"], responses=ERRORS)

_REDIS_TIMEOUT_S = 1.0


@router.get("/v1/stats", response_model=None, responses=STATISTICS)
def statistics(services: CurrentServices) -> Response:
    """Return speed and speculation statistics of all jobs."""
    with services.database.read() as session:
        return JSONResponse(serializers.statistics(queries.total_stats(session)))


@router.get("/v1/stats/jobs", response_model=None, responses=JOB_ROWS)
def statistics_by_job(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    job: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """List the statistics of the newest jobs, or of one, as flat rows."""
    with services.database.read() as session:
        rows = job_summaries(session, limit, owner=caller.sees, job_id=job)
    if job is not None and not rows:
        raise NotFound(f"There is no job {job[:80]!r}.", param="job")
    return JSONResponse({"object": "list", "data": [asdict(row) for row in rows]})


@router.get("/v1/workers", response_model=None, responses=WORKERS)
def workers(services: CurrentServices) -> Response:
    """List the registered workers, with their measured cost curves."""
    with services.database.read() as session:
        found = queries.workers(session)
    return JSONResponse({"object": "list", "data": [serializers.worker(worker) for worker in found]})


@router.get("/v1/numerics/{fingerprint}", response_model=None, responses=NUMERICS)
def read_numerics(fingerprint: str, services: CurrentServices) -> Response:
    """Read what a fingerprint of an output stands for: weights, dtype, device kind, kernels, libraries."""
    with services.database.read() as session:
        found = numerics.find(session, fingerprint)
    if found is None:
        raise NotFound(f"There are no numerics {fingerprint[:80]!r}.", param="fingerprint")
    return JSONResponse(serializers.numerics(found))


@router.get("/v1/models", response_model=None, responses=MODELS)
def models(services: CurrentServices) -> Response:
    """List the models that jobs may use."""
    known = known_models(services.database, services.settings)
    listed = [serializers.model(name, known.context_tokens(name)) for name in known.names]
    return JSONResponse({"object": "list", "data": listed})


@router.get("/v1/models/{model:path}", response_model=None, responses=MODEL)
def model(model: str, services: CurrentServices) -> Response:
    """Read one model, by any of its names. Hub ids contain a slash, so the name is the rest of the path."""
    known = known_models(services.database, services.settings)
    name = known.resolve(model)
    return JSONResponse(serializers.model(name, known.context_tokens(name)))


@router.get("/healthz", response_model=None, responses=HEALTH)
def health() -> Response:
    """Liveness: answer while the process runs."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=None, responses=READY)
def ready(services: CurrentServices) -> Response:
    """Readiness: 503 if the database is unavailable. A missing Redis is reported as degraded."""
    with services.database.read() as session:
        session.execute(text("SELECT 1"))
        served = queries.models(session)
    return JSONResponse(
        {
            "status": "ready",
            "database": "ok",
            "redis": _redis_state(services.settings.redis_url),
            "models": [view.target for view in served],
        }
    )


def _redis_state(redis_url: str) -> str:
    """Return ok or degraded. Without Redis jobs are still accepted: workers poll the database."""
    client = redis.Redis.from_url(redis_url, socket_timeout=_REDIS_TIMEOUT_S, socket_connect_timeout=_REDIS_TIMEOUT_S)
    try:
        with client:
            client.ping()
    except (RedisError, OSError):
        return "degraded"
    return "ok"
