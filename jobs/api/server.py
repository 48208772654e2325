"""Serve the shim with uvicorn on a socket of our own, so that port 0 can be told to whoever started us."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from jobs.api.app import make_api
from jobs.errors import SetupError
from jobs.liveness import identity
from jobs.logs import log_to_stderr
from jobs.partials import Publisher
from jobs.producer import make_producer_app, ring
from jobs.reconciler import Reconciler
from jobs.schema_guard import require_schema
from jobs.settings import JobsSettings
from storage.session import Database

_BACKLOG = 2048
_SHUTDOWN_S = 5  # streams that are still open after this are cut


def serve(settings: JobsSettings, ready_file: Path | None = None) -> None:
    """Serve until a signal comes. The URL is written to `ready_file` as soon as connections are taken."""
    log_to_stderr(settings.log_format)
    require_schema(settings.resolved_database_url)
    listener = _listen(settings.api_host, settings.api_port)
    database = Database.open(settings.resolved_database_url)
    config = uvicorn.Config(
        make_api(settings, database), log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S
    )
    if ready_file is not None:
        _write_url(ready_file, listener)
    try:
        with _reconciling(settings, database):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        database.dispose()


@contextmanager
def _reconciling(settings: JobsSettings, database: Database) -> Iterator[None]:
    """Stand for reconciler beside the workers: jobs expire also while there is none."""
    bells = make_producer_app(settings.redis_url)
    publisher = Publisher(settings.redis_url)
    reconciler = Reconciler(
        database,
        publisher.publish,
        lambda job_id, model: ring(bells, job_id, model),
        name=f"shim-{identity() or uuid.uuid4().hex}",
        lease_s=settings.lease_s,
    )
    reconciler.start()
    try:
        yield
    finally:
        reconciler.stop()
        publisher.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise SetupError(
            f"The shim can't listen on {host}:{port}: {exc.strerror}. Set BASIC_API_PORT to a free port, or to 0."
        ) from exc


def _write_url(path: Path, listener: socket.socket) -> None:
    """Write the URL in one piece: whoever waits for the file must not read half of it."""
    host, port = listener.getsockname()[:2]
    part = path.with_suffix(".part")
    part.write_text(f"http://{f'[{host}]' if ':' in host else host}:{port}\n")
    part.replace(path)
