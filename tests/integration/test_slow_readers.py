"""Subscribers that never read are disconnected, and neither the publisher nor other readers are delayed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from jobs.messages import PartialEvent
from jobs.streaming.pubsub import Publisher, channel
from tests.conftest import free_port, start_redis, stop

DEAF = 20
COMMITS, EVENTS = 150, 64  # as a worker with 64 sequences publishes them
TEXT = "a few more words of text " * 60
SENT_BYTES = COMMITS * EVENTS * len(TEXT)
DEADLINE_S = 60.0


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a Redis-protocol server for this test alone."""
    port = free_port()
    server = start_redis(port, tmp_path)
    yield port
    stop(server)


def deaf_subscriber(port: int, job_id: str) -> socket.socket:
    """Subscribe to a job and read only the confirmation."""
    subscriber = socket.socket()
    subscriber.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    subscriber.connect(("127.0.0.1", port))
    subscriber.sendall(f"SUBSCRIBE {channel(job_id)}\r\n".encode())
    assert subscriber.recv(16)
    return subscriber


def publish_to_a_reader(port: int, job_id: str) -> tuple[float, float]:
    """Publish to a reader of all events; return the seconds until its last event, and those of all `publish` calls."""
    publisher, published_s = Publisher(f"redis://127.0.0.1:{port}/0"), 0.0
    events = [PartialEvent(job_id=job_id, request="a", index=n, type="tokens", text=TEXT) for n in range(EVENTS)]
    with redis.Redis(port=port) as client, client.pubsub(ignore_subscribe_messages=True) as reader:
        reader.subscribe(channel(job_id))
        reader.get_message(timeout=5)
        began_at = time.monotonic()
        for _ in range(COMMITS):
            handed_over_at = time.monotonic()
            publisher.publish(events)
            published_s += time.monotonic() - handed_over_at
            for _ in range(EVENTS):  # one commit after the other, as a worker's come
                assert reader.get_message(timeout=DEADLINE_S) is not None
        took_s = time.monotonic() - began_at
    publisher.close()
    return took_s, published_s


def test_subscribers_that_never_read_are_cut_off_and_slow_nobody(port: int) -> None:
    with redis.Redis(port=port) as client, ExitStack() as opened:
        for _ in range(DEAF):
            opened.enter_context(deaf_subscriber(port, "job"))
        assert len(client.client_list("pubsub")) == DEAF
        alone_s, _ = publish_to_a_reader(port, "another job")
        took_s, published_s = publish_to_a_reader(port, "job")
        assert client.client_list("pubsub") == []
        assert client.info("memory")["used_memory_peak"] < DEAF * 12e6 < DEAF * SENT_BYTES
    assert published_s < took_s / 2, "a publisher does not wait for its readers"
    assert took_s < 10 * alone_s, "and its readers wait for no other one"
