"""The service of a chaos run: every part is a real process that can be killed, stopped or lose its data.

Like `basic up` it starts the parts with `jobs.processes` and restarts them. Unlike `basic up`, parts are accessible by
name, there are two workers, and the database may be a temporary PostgreSQL server.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import redis
from sqlalchemy import text

from jobs.local.redis_server import is_ready, server_arguments, server_binary
from jobs.processes import Child, Command, python_module
from storage import schema
from storage.session import DATABASE_UNAVAILABLE, Database
from tests.chaos.worker import STEP_VARIABLE
from tests.paths import ROOT
from tests.ports import free_port
from tests.postgres import Postgres

_READY_S = 840.0


class Stack:
    """All parts of one service. Call `tend` often: it restarts dead parts."""

    def __init__(
        self, directory: Path, target: Path, postgres: Postgres | None, *, workers: int = 2, step_s: float = 0.02
    ) -> None:
        """Keep all files below `directory`: data in `disk`, logs beside it.

        The database is SQLite in `disk`, or a database of `postgres`.
        """
        self.directory = directory
        self.disk = directory / "disk"
        self.postgres = postgres
        self.redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self.api_url = f"http://127.0.0.1:{free_port()}"
        self.database_path = self.disk / "data" / "basic.sqlite3"
        self.database_path.parent.mkdir(parents=True)
        self.database_url = postgres.create("chaos") if postgres else f"sqlite:///{self.database_path}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BASIC_")},
            # Children start with -P, which finds installed packages only: `tests` is not one of them.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "BASIC_DATA_DIR": str(self.disk / "data"),
            "BASIC_DATABASE_URL": self.database_url,
            "BASIC_REDIS_URL": self.redis_url,
            "BASIC_API_URL": self.api_url,
            "BASIC_API_PORT": self.api_url.rpartition(":")[2],
            "BASIC_TARGET": str(target),
            "BASIC_WEBHOOK_NETWORKS": "127.0.0.0/8",
            "BASIC_CACHE": "off",  # the same prompts are decoded again and again
            "BASIC_DTYPE": "float32",
            "BASIC_MAX_SEQUENCES": "8",
            "BASIC_MAX_CONTEXT": "512",
            "BASIC_THREADS": "1",
            "BASIC_LEASE_S": "4",
            "BASIC_DEAF_S": "20",
            "BASIC_CACHE_DIR": str(directory / "cache"),
            "OMP_NUM_THREADS": "1",
            STEP_VARIABLE: str(step_s),
        }
        self.children: dict[str, Child] = {}
        self.down: set[str] = set()  # parts that a fault keeps from being started again
        self._workers = workers
        self.database = Database.open(self.database_url)

    def start(self, *, doors: bool = True, victim_prefix: tuple[str, ...] = ()) -> None:
        """Start all parts and return when they serve jobs. Without `doors`: no API server and no ingest process.

        `victim_prefix` is put before the command of the first worker, for example to give it a PID namespace.
        """
        schema.upgrade(self.database_url)
        self.start_redis()
        if not doors:
            for number in range(self._workers):
                prefix = () if number else victim_prefix
                self._start(f"worker-{number}", (*prefix, *python_module("tests.chaos.worker")))
            self.wait_for(lambda: len(self.rows("SELECT id FROM workers")) == self._workers, "the worker")
            return
        for name, module in (("ingest", "jobs.ingest"), ("api", "jobs.api")):
            self._start(name, python_module(module))
        for number in range(self._workers):
            self._start(f"worker-{number}", python_module("tests.chaos.worker"))
        self.wait_for(self.ready, "the service")

    def stop(self) -> None:
        """End all processes."""
        for child in reversed(self.children.values()):
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGCONT)
                os.kill(child.pid, signal.SIGKILL)
        for child in self.children.values():
            child._process.wait()
        self.database.dispose()

    def tend(self) -> None:
        """Restart dead parts, except those that a fault keeps down."""
        for name, child in self.children.items():
            if name not in self.down and child.status() is not None:
                child.restarts = 0  # otherwise the restart delay grows to half a minute over many faults
                child.restart_if_due()

    def rest(self, seconds: float) -> None:
        """Wait for a time, restarting dead parts meanwhile."""
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            self.tend()
            time.sleep(0.05)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = _READY_S) -> None:
        """Wait until the condition holds, restarting dead parts meanwhile."""
        ends_at = time.monotonic() + timeout_s
        while not condition():
            self.tend()
            assert time.monotonic() < ends_at, f"{what} did not come in {timeout_s:.0f} s; logs in {self.directory}"
            time.sleep(0.05)

    def ready(self) -> bool:
        """Return whether the API server answers and lists a live worker."""
        try:
            reply = httpx.get(f"{self.api_url}/readyz", timeout=5.0, trust_env=False)
        except httpx.TransportError:
            return False
        return reply.is_success and bool(reply.json()["models"])

    def status(self, name: str) -> int | None:
        """Return the exit status of a part, None while it runs."""
        return self.children[name].status()

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a part, if it runs."""
        if self.children[name].status() is None:
            os.kill(self.children[name].pid, number)

    def workers(self) -> list[str]:
        """Return the names of the worker processes."""
        return [name for name in self.children if name.startswith("worker")]

    def start_redis(self) -> None:
        """Start the Redis-protocol server on its port and return when it answers."""
        directory = self.disk / "redis"
        directory.mkdir(exist_ok=True)
        self.down.discard("redis")
        self._start("redis", server_arguments(server_binary(), self.redis_port, directory))
        self.wait_for(lambda: is_ready(self.redis_url), "the Redis-protocol server")

    @contextmanager
    def without_redis(self, *, lose_data: bool) -> Iterator[None]:
        """Stop the Redis-protocol server inside the block, then start it, with `lose_data` empty."""
        self.down.add("redis")
        self.kill("redis")
        self.children["redis"]._process.wait()
        if lose_data:
            shutil.rmtree(self.disk / "redis")
        yield
        self.start_redis()

    def redis(self) -> redis.Redis:
        """Return a client of the Redis-protocol server."""
        return redis.Redis(port=self.redis_port, socket_timeout=5.0, decode_responses=False)

    def rows(self, query: str, **values: object) -> list[tuple[object, ...]]:
        """Return the rows of a query; wait while the database is unavailable."""
        ends_at = time.monotonic() + _READY_S
        while True:
            try:
                with self.database.read() as session:
                    return [tuple(row) for row in session.execute(text(query), values)]
            except DATABASE_UNAVAILABLE:
                assert time.monotonic() < ends_at, "the database did not come back"
                self.rest(0.2)

    def _start(self, name: str, arguments: tuple[str, ...]) -> None:
        log_path = self.directory / f"{name}.log"
        self.children[name] = Child(Command(name, arguments, self.environment, log_path))
