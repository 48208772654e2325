"""Worker notifications: `notify` does not block, and every model is notified after a hang of the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from celery import Celery

from jobs.queue.worker_notifier import WorkerNotifier


class Server:
    """Blocks notifications until `open` is set."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.asked = threading.Semaphore(0)
        self.open = threading.Event()

    def notify(self, app: Celery, job_id: str, model: str) -> None:
        self.asked.release()
        assert self.open.wait(60)
        if job_id == "broken":
            raise ValueError("no message")
        self.sent.append((job_id, model))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr("jobs.queue.worker_notifier.notify_workers", server.notify)
    yield server
    server.open.set()


def test_notifications_during_a_hang_are_sent_once_per_model_afterwards(server: Server) -> None:
    notifier = WorkerNotifier("redis://127.0.0.1:1/0")
    notifier.notify("job-1", "tiny")
    assert server.asked.acquire(timeout=60)
    for number in range(2, 100):  # returns at once, although nothing is sent yet
        notifier.notify(f"job-{number}", "tiny")
    notifier.notify("job-100", "large")
    assert server.sent == []
    server.open.set()
    assert all(server.asked.acquire(timeout=60) for _ in range(2))
    notifier._thread.shutdown()
    assert server.sent == [("job-1", "tiny"), ("job-99", "tiny"), ("job-100", "large")]


def test_a_notification_that_fails_is_logged_and_the_next_one_is_sent(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.open.set()
    notifier = WorkerNotifier("redis://127.0.0.1:1/0")
    notifier.notify("broken", "tiny")
    assert server.asked.acquire(timeout=60)
    notifier.notify("job-2", "tiny")
    notifier._thread.shutdown()
    assert server.sent == [("job-2", "tiny")]
    assert "A worker notification failed" in caplog.text
