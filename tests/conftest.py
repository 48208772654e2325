"""Redis and PostgreSQL servers for tests that need them: processes on free ports."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import redis
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from jobs.local.redis_server import server_arguments, server_binary
from tests.ports import free_port
from tests.postgres import QUICK, Postgres
from tests.scheduling import ByServers

# Triton reads this at import: without a GPU the kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

gc.disable()  # what is imported stays: looking through it for garbage takes a tenth of the unit tier

__all__ = ["free_port", "start_redis", "stop"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured logs: processes of pytest-xdist send reports as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_configure() -> None:
    """Restore Ctrl-C, which shells ignore in background jobs: some tests send SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Distribute tests with `--dist loadscope` by the servers that they share."""
    return ByServers(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_finish() -> None:
    """Collect garbage again, but only what tests make; let the loggers of torch propagate.

    pytest adds its handlers to every logger that does not, six times per test.
    """
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.partition(".")[0] == "torch":
            logger.propagate = True
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)  # small tests make little garbage, and each search calls hypothesis
    gc.enable()


def start_redis(port: int, directory: Path) -> subprocess.Popen[bytes]:
    """Start a Redis-protocol server like `basic up` does, and wait until it answers."""
    server = subprocess.Popen(server_arguments(server_binary(), port, directory), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
                return server
            except redis.ConnectionError:
                if time.monotonic() > deadline or server.poll() is not None:
                    server.kill()
                    server.wait()
                    raise
                time.sleep(0.01)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis-protocol server for the whole session."""
    port = free_port()
    server = start_redis(port, tmp_path_factory.mktemp("redis"))
    yield f"redis://127.0.0.1:{port}/0"
    stop(server)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL database that tests may empty: TEST_POSTGRES_URL, else one on a temporary server."""
    named = os.environ.get("TEST_POSTGRES_URL")
    if named:
        yield named
        return
    server = Postgres(**QUICK)
    server.start()
    try:
        yield server.create("basic_tests")
    finally:
        server.remove()
