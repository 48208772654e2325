"""Run the API server: uvicorn on our own socket, so that port 0 works and its URL goes to the ready file."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from jobs.api.app import make_api
from jobs.api.auth.authentication import Authenticator
from jobs.api.http.h11_protocol import TimeoutH11Protocol
from jobs.api.http.host_check import ServedNames
from jobs.dashboard import app as dashboard
from jobs.dashboard.body_limit import SOCKET_BYTES
from jobs.errors import SetupError
from jobs.local.key import read_local_key
from jobs.logs import log_to_stderr
from jobs.queue.worker_notifier import WorkerNotifier
from jobs.schema_check import require_schema
from jobs.settings import JobsSettings
from jobs.streaming.pubsub import Publisher
from jobs.tracing import start_tracing, stop_tracing
from jobs.upkeep.pruner import Pruner
from jobs.upkeep.reconciler import ROLE, Reconciler
from jobs.webhooks.sender import WebhookSender
from storage import keys
from storage.leader_election import resign
from storage.session import LONG_STATEMENT_TIMEOUT_S, Database, is_read_only

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 120  # longer than HTTP clients keep idle connections: they must not send into one that closes
_SHUTDOWN_TIMEOUT_S = 5  # for open streams; then they are closed


class _Server(uvicorn.Server):
    """uvicorn without re-raising the signal after shutdown: our clean-up must still run."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down gracefully; at once on a second Ctrl-C."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(settings: JobsSettings, ready_file: Path | None = None) -> None:
    """Serve until a signal. Write the URL to `ready_file` once connections are accepted."""
    log_to_stderr(settings.log_format)
    start_tracing("basic-api")
    require_schema(settings.resolved_database_url)
    database = Database.open(settings.resolved_database_url)
    authenticator = _authenticator(settings, database)
    _warn_if_read_only(database)
    listener = _listen(settings.api_host, settings.api_port)
    api = make_api(settings, database, authenticator=authenticator, served_names=ServedNames.of(settings))
    dashboard.install(api, api.state.services, authenticator)
    if ready_file is not None:
        _write_url(ready_file, listener)
    try:
        with _upkeep(settings):
            _Server(server_config(api)).run(sockets=[listener])
    finally:
        database.dispose()
        stop_tracing()


def server_config(api: FastAPI) -> uvicorn.Config:
    """Return uvicorn's configuration: our HTTP/1.1 protocol, timeouts and log format."""
    return uvicorn.Config(
        api,
        http=TimeoutH11Protocol,
        ws_max_size=SOCKET_BYTES,
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
    )


@contextmanager
def _upkeep(settings: JobsSettings) -> Iterator[None]:
    """Run reconciler, pruner and the sender of webhooks beside the server: jobs expire also while no worker runs."""
    database = Database.open(settings.resolved_database_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
    publisher = Publisher(settings.redis_url)
    reconciler = Reconciler(
        database,
        publisher.publish,
        WorkerNotifier(settings.redis_url).notify,
        lease_s=settings.lease_s,
    )
    sender, pruner = WebhookSender(database, settings), Pruner(database, settings)
    reconciler.start()
    sender.start()
    pruner.start()
    try:
        yield
    finally:
        sender.stop()
        pruner.stop()
        reconciler.stop()
        publisher.close()
        database.dispose()


def _authenticator(settings: JobsSettings, database: Database) -> Authenticator:
    """Return the authenticator; raise SetupError for a public address without any API key."""
    host, on_loopback = settings.api_host, _is_loopback(settings.api_host)
    if not _has_keys(database):
        if not on_loopback:
            raise SetupError(
                f"There is no API key, so the API server listens on loopback only, not on {host}. "
                "Create one with `basic keys create NAME --scope admin`, or leave BASIC_API_HOST at 127.0.0.1."
            )
        log.warning(
            "There is no API key: every user of this machine may call the service on %s. "
            "Create a key with `basic keys create NAME`",
            host,
            extra={"action": "keyless"},
        )
    return Authenticator(database, local_key=read_local_key(settings.data_dir), keyless=on_loopback)


def _has_keys(database: Database) -> bool:
    """Return whether a key exists; True while the database is unavailable, the safe assumption."""
    try:
        with database.read() as session:
            return keys.keys_in_use(session)
    except SQLAlchemyError as exc:
        log.warning("Can't read the API keys: %s", exc, extra={"action": "database_away"})
        return True


def _warn_if_read_only(database: Database) -> None:
    try:
        with database.write() as session:
            resign(session, ROLE, "")  # changes no row, but needs write access
    except SQLAlchemyError as exc:
        if is_read_only(exc):
            log.warning(
                "The database is read-only: jobs and outputs are served, submissions get 503",
                extra={"action": "database_read_only"},
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise SetupError(
            f"The API server can't listen on {host}:{port}: {exc.strerror}. Set BASIC_API_PORT to a free port, or to 0."
        ) from exc


def _write_url(path: Path, listener: socket.socket) -> None:
    """Write the URL atomically: a process that waits for the file must not read half of it."""
    host, port = listener.getsockname()[:2]
    part = path.with_suffix(".part")
    try:
        part.write_text(f"http://{f'[{host}]' if ':' in host else host}:{port}\n")
        part.replace(path)
    except OSError as exc:
        raise SetupError(f"Can't write the ready file {path}: {exc.strerror}") from exc
