"""Doorbells: whoever has one rung does not wait, and every model that was to be rung is rung after that."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from celery import Celery

from jobs.queue.worker_notifier import Doorbells


class Server:
    """Takes a ring only when it is let."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.asked = threading.Semaphore(0)
        self.open = threading.Event()

    def ring(self, app: Celery, job_id: str, model: str) -> None:
        self.asked.release()
        assert self.open.wait(10)
        if job_id == "broken":
            raise ValueError("no message")
        self.heard.append((job_id, model))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr("jobs.queue.worker_notifier.ring", server.ring)
    yield server
    server.open.set()


def test_what_is_to_be_rung_while_the_server_hangs_rings_once_a_model_afterwards(server: Server) -> None:
    doorbells = Doorbells("redis://127.0.0.1:1/0")
    doorbells.ring("job-1", "tiny")
    assert server.asked.acquire(timeout=10)
    for number in range(2, 100):  # returns at once, although nothing is heard yet
        doorbells.ring(f"job-{number}", "tiny")
    doorbells.ring("job-100", "large")
    assert server.heard == []
    server.open.set()
    assert all(server.asked.acquire(timeout=10) for _ in range(2))
    doorbells._thread.shutdown()
    assert server.heard == [("job-1", "tiny"), ("job-99", "tiny"), ("job-100", "large")]


def test_a_ring_that_fails_is_logged_and_the_next_one_rings(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.open.set()
    doorbells = Doorbells("redis://127.0.0.1:1/0")
    doorbells.ring("broken", "tiny")
    assert server.asked.acquire(timeout=10)
    doorbells.ring("job-2", "tiny")
    doorbells._thread.shutdown()
    assert server.heard == [("job-2", "tiny")]
    assert "A doorbell failed" in caplog.text
