"""The channel between the engine and the request loop, which run in two processes."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

_PROTOCOL: Final = 5  # arrays are pickled as one piece
_BUFFER_BYTES: Final = 4 << 20  # of the socket; the kernel may grant less


class Channel(Protocol):
    """One end of a connection; messages arrive in order."""

    def send(self, message: Any) -> None:
        """Send a message to the other end."""

    def receive(self) -> list[Any]:
        """Return the messages that have arrived, without waiting."""


class SocketChannel:
    """One end of a connection to another process.

    A thread receives, so that the other process waits for none of this one's work. Sending may wait for that thread.
    """

    def __init__(self, connection: Connection, news: threading.Event | None = None) -> None:
        """Receive from now on; `news` is set when a message arrives and when the other end is gone."""
        self._connection = connection
        self._arrived: deque[bytes] = deque()
        self._news = news or threading.Event()
        self.closed = False  # the other end is gone
        self.heard = False  # a message has arrived
        self.heard_at = time.monotonic()  # when the last message arrived; until then, the start
        self._thread = threading.Thread(target=self._receive_all, name="basic-channel", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Send a message; one to a process that is gone is dropped."""
        try:
            self._connection.send_bytes(pickle.dumps(message, _PROTOCOL))
        except OSError:
            self.closed = True

    def receive(self) -> list[Any]:
        """Return the messages that have arrived."""
        self._news.clear()
        return [pickle.loads(self._arrived.popleft()) for _ in range(len(self._arrived))]

    def receive_first(self) -> Any | None:
        """Return the next message alone, None if none has arrived."""
        return pickle.loads(self._arrived.popleft()) if self._arrived else None

    def wait(self, timeout_s: float) -> None:
        """Wait for a message or for the end of the other process."""
        self._news.wait(timeout_s)

    def close(self) -> None:
        """Close this end; the other end hears of it."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._connection.close()

    def _receive_all(self) -> None:
        while not self.closed:
            try:
                self._arrived.append(self._connection.recv_bytes())
            except (EOFError, OSError):
                self.closed = True
            else:
                self.heard, self.heard_at = True, time.monotonic()
            self._news.set()


def socket_pair() -> tuple[Connection, Connection]:
    """Return the two ends of a connection that another process may inherit."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    one, other = (Connection(end.detach()) for end in ends)
    return one, other
