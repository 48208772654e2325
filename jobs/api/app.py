"""Build the API server's ASGI application: middleware, routes and error handlers."""

from __future__ import annotations

from fastapi import FastAPI

from jobs.api import errors
from jobs.api.auth.authentication import Authenticator, AuthMiddleware
from jobs.api.auth.revocation import RevocationMonitor
from jobs.api.auth.stream_limits import StreamLimits
from jobs.api.dependencies import Services, prefetch_job
from jobs.api.http.body import BodyReader
from jobs.api.http.host_check import HostCheckMiddleware, ServedNames
from jobs.api.http.limits import BodyLimitMiddleware
from jobs.api.http.multipart import FORM_BYTES
from jobs.api.http.paths import PathMiddleware
from jobs.api.request_ids import RequestIdMiddleware
from jobs.api.routes import (
    batches,
    completions,
    docs,
    files,
    jobs,
    metrics,
    responses,
    service,
    uploads,
    verifications,
    webhooks,
)
from jobs.api.schemas import openapi
from jobs.producer import Notify
from jobs.queue.worker_notifier import WorkerNotifier
from jobs.settings import JobsSettings
from jobs.streaming.hub import EventHub
from storage.session import Database


def make_api(
    settings: JobsSettings,
    database: Database,
    notify: Notify | None = None,
    authenticator: Authenticator | None = None,
    served_names: ServedNames | None = None,
) -> FastAPI:
    """Return the ASGI application that serves `database`.

    Defaults: `notify` notifies workers through the Redis server of the settings, `authenticator` accepts all callers
    until a key is created, and without `served_names` every `Host` is accepted.
    """
    app = FastAPI(title="bASIC", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = Services(
        settings,
        database,
        notify or WorkerNotifier(settings.redis_url).notify,
        BodyReader(),
        EventHub(database, settings.redis_url),
    )
    app.state.metrics = metrics.Metrics(database)
    app.state.stream_limits = StreamLimits(settings.max_streams, settings.max_streams_per_key)
    max_bytes_by_path = {"/v1/files": settings.max_file_bytes + FORM_BYTES}
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes, max_bytes_by_path=max_bytes_by_path)
    app.state.revocations = RevocationMonitor(database)
    app.add_middleware(
        AuthMiddleware,
        authenticator=authenticator or Authenticator(database),
        revocations=app.state.revocations,
        prefetch=prefetch_job,
    )
    app.add_middleware(PathMiddleware)
    app.add_middleware(HostCheckMiddleware, served_names=served_names)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(metrics.LatencyMiddleware, metrics=app.state.metrics)
    for resource in (
        jobs,
        files,
        batches,
        completions,
        responses,
        service,
        metrics,
        uploads,
        webhooks,
        verifications,
        docs,
    ):  # the most frequent are matched first
        app.router.routes.extend(resource.router.routes)  # include_router would build each route again for this app
    errors.install(app)
    openapi.install(app)
    return app
