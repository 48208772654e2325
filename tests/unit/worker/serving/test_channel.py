"""The channel between two processes: order, waking, and the end of the other side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from worker.serving.channel import SocketChannel, socket_pair


@pytest.fixture
def ends() -> Iterator[tuple[SocketChannel, SocketChannel]]:
    """The two ends of a channel."""
    near, far = map(SocketChannel, socket_pair())
    yield near, far
    far.close()
    near.close()


def received(channel: SocketChannel, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        channel.wait(10.0)
        found += channel.receive()
    return found


def test_messages_arrive_in_order_also_when_the_other_side_sends_more_than_a_socket_holds(
    ends: tuple[SocketChannel, SocketChannel],
) -> None:
    channel, other = ends
    for number in range(200):
        other.send((number, b"x" * 50_000))  # `receive` is not called meanwhile
    assert [number for number, _ in received(channel, 200)] == list(range(200))
    assert channel.heard


def test_the_first_message_can_be_received_without_those_behind_it(ends: tuple[SocketChannel, SocketChannel]) -> None:
    channel, other = ends
    assert channel.receive_first() is None
    other.send("setup")
    other.send("report")
    while (first := channel.receive_first()) is None:
        channel.wait(10.0)
    assert first == "setup"
    assert received(channel, 1) == ["report"]


def test_an_end_that_is_gone_wakes_the_other_and_messages_to_it_are_dropped(
    ends: tuple[SocketChannel, SocketChannel],
) -> None:
    channel, far = ends
    waited = threading.Thread(target=channel.wait, args=(60.0,))
    waited.start()
    far.close()
    waited.join(10.0)
    assert not waited.is_alive()
    channel.close()
    assert channel.closed
    channel.send("nobody reads this")
    assert channel.receive() == []
