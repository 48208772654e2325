"""Start an embedded service step by step: model download, Redis-protocol server, schema, ingest, API server, worker.

Every step waits until its process answers, or raises an error that says why it can't.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from jobs.errors import ChildRefused, SetupError
from jobs.local.key import make_local_key
from jobs.local.redis_server import is_ready, server_arguments, server_binary
from jobs.local.state import LocalService
from jobs.messages import model_name
from jobs.processes import BAD_SETTINGS_STATUS, Child, Children, Command, launch, python_module, rotate_logs
from jobs.schema_check import upgrade_schema
from jobs.settings import JobsSettings, environment
from storage import queries
from storage.session import Database

_READY_TIMEOUT_S = 60.0  # of every process but the worker, which may load a model for longer
_STATUS_EVERY_S = 10.0  # between two lines to a waiting user
_TICK_S = 0.1
_WORKER_STOP_S = 20.0  # the worker finishes its step, commits, and returns its requests to the queue


class StartupStopped(Exception):
    """A signal arrived before the service had started."""


@dataclass(frozen=True, slots=True)
class Startup:
    """The start of one embedded service."""

    settings: JobsSettings
    children: Children
    stop: threading.Event
    models_umask: int | None = None  # the model cache may be shared by users; all other files are private

    def run(self) -> LocalService:
        """Start everything and return the addresses; raise SetupError, or StartupStopped after a signal."""
        self._fetch_models()
        settings, _, api_server = self._start_without_worker()
        self._start_worker(settings)
        self._await(api_server, lambda: _ready(settings.api_url), "the API server")
        return LocalService(
            api_url=settings.api_url,
            redis_url=settings.redis_url,
            database_url=settings.resolved_database_url,
            data_dir=str(settings.data_dir),
            pid=os.getpid(),
        )

    def run_without_worker(self) -> tuple[JobsSettings, dict[str, int]]:
        """Start everything but the worker; return the settings with the chosen addresses, and process ids by name."""
        settings, ingest, api_server = self._start_without_worker()
        self._await(api_server, lambda: _ready(settings.api_url), "the API server", None)
        return settings, {"ingest": ingest.pid, "api": api_server.pid}

    def _start_without_worker(self) -> tuple[JobsSettings, Child, Child]:
        settings = self.settings
        if "redis_url" not in settings.model_fields_set:
            settings = self._start_redis(settings)
        elif not is_ready(settings.redis_url):
            raise SetupError("no Redis-protocol server answers at BASIC_REDIS_URL; start it, or unset the variable")
        upgrade_schema(settings.resolved_database_url)
        settings = _with_api_address(settings)
        ingest = self._start_python("ingest", "jobs.ingest", settings)
        make_local_key(settings.data_dir)
        return settings, ingest, self._start_python("api", "jobs.api", settings)

    def _fetch_models(self) -> None:
        """Fetch the models in the foreground, so that the user sees the download."""
        if importlib.util.find_spec("torch") is None:
            raise SetupError("a worker needs torch, which is not installed; run: pip install 'basic-batch[worker]'")
        command = Command(
            "models", python_module("worker.loading.model_store"), environment(self.settings), umask=self.models_umask
        )
        process = launch(command)
        while process.poll() is None:
            if self.stop.wait(_TICK_S):
                process.terminate()
                process.wait()
                raise StartupStopped
        if process.returncode != 0:
            kind = ChildRefused if process.returncode == BAD_SETTINGS_STATUS else SetupError
            raise kind("the model could not be fetched; see the error above")

    def _start_redis(self, settings: JobsSettings) -> JobsSettings:
        directory = settings.data_dir / "redis"
        directory.mkdir(mode=0o700, exist_ok=True)
        port = free_port("127.0.0.1")
        password = secrets.token_hex(32)
        arguments = server_arguments(server_binary(), port, directory, password)
        child = self.children.start(self._command("redis", arguments, settings))
        redis_url = f"redis://:{password}@127.0.0.1:{port}/0"
        self._await(child, lambda: is_ready(redis_url), "the Redis-protocol server")
        return settings.model_copy(update={"redis_url": redis_url})

    def _start_worker(self, settings: JobsSettings) -> None:
        """Start the worker and wait for the row in SQL of each of its models, which it writes when they are loaded."""
        database = Database.open(settings.resolved_database_url)
        try:
            earlier = _workers(database).keys()
            targets = {model_name(target) for target in settings.targets}
            child = self._start_python("worker", "worker", settings, stop_s=_WORKER_STOP_S)

            def ready() -> bool:
                return targets <= {model for worker, model in _workers(database).items() if worker not in earlier}

            self._await(child, ready, f"the worker ({settings.target})", None)
        finally:
            database.dispose()

    def _start_python(self, name: str, module: str, settings: JobsSettings, stop_s: float = 10.0) -> Child:
        return self.children.start(self._command(name, python_module(module), settings, stop_s))

    def _command(self, name: str, arguments: tuple[str, ...], settings: JobsSettings, stop_s: float = 10.0) -> Command:
        log_path = settings.data_dir / "logs" / f"{name}.log"
        rotate_logs([log_path])
        return Command(name, arguments, environment(settings), log_path, stop_s)

    def _await(
        self, child: Child, ready: Callable[[], bool], name: str, timeout_s: float | None = _READY_TIMEOUT_S
    ) -> None:
        """Wait until `ready` returns True; raise SetupError if a child dies or the timeout expires."""
        began_at = time.monotonic()
        status_at = began_at + _STATUS_EVERY_S
        while not ready():
            for dead in self.children.dead():
                raise _child_died(dead)
            waited_s = time.monotonic() - began_at
            if timeout_s is not None and waited_s > timeout_s:
                raise SetupError(f"{name} did not answer in {timeout_s:.0f} s; its log: {child.command.log_path}")
            if time.monotonic() > status_at:
                print_status(f"Waiting for {name} ({waited_s:.0f} s)")
                status_at += _STATUS_EVERY_S
            if self.stop.wait(_TICK_S):
                raise StartupStopped


def print_status(sentence: str) -> None:
    """Print a line for the waiting user, on standard error."""
    print(sentence, file=sys.stderr, flush=True)


def _with_api_address(settings: JobsSettings) -> JobsSettings:
    """Choose the port of the API server: the one that was set, else the default if it is free, else a free one."""
    host, port = settings.api_host, settings.api_port
    if port == 0 or not _is_free(host, port):
        if port != 0 and "api_port" in settings.model_fields_set:
            raise SetupError(f"port {port} on {host} is taken; set BASIC_API_PORT to a free port, or to 0 for any")
        port = free_port(host)
    reached_at = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return settings.model_copy(update={"api_port": port, "api_url": f"http://{reached_at}:{port}"})


def _is_free(host: str, port: int) -> bool:
    try:
        free_port(host, port)
    except OSError:
        return False
    return True


def free_port(host: str, port: int = 0) -> int:
    """Return the port if it is free, else raise OSError. For 0, return any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        return int(listener.getsockname()[1])


def _workers(database: Database) -> dict[str, str]:
    """Return the models that workers serve, by the worker's id."""
    with database.read() as session:
        return {worker.id: worker.target for worker in queries.workers(session)}


def _ready(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/readyz", timeout=2.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _child_died(child: Child) -> SetupError:
    """Return the error for a child that exited, with the end of its log."""
    log_tail = child.log_tail() or "(its log is empty)"
    log = f"Full log: {child.command.log_path}"
    if child.status() == BAD_SETTINGS_STATUS:
        return ChildRefused(f"{child.command.name} can't start: {log_tail.splitlines()[-1]}\n{log}")
    return SetupError(
        f"{child.command.name} exited with status {child.status()} during the start. Its log ends with:\n"
        f"{log_tail}\n{log}"
    )
