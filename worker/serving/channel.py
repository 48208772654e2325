"""Channels between the engine and the request loop: inside one process, or over a pipe."""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any, Protocol

_PROTOCOL = 5  # arrays are pickled as one piece


class Channel(Protocol):
    """One end of a connection; messages arrive in order."""

    def send(self, message: Any) -> None:
        """Send a message to the other end."""

    def receive(self) -> list[Any]:
        """Return the messages that have arrived, without waiting."""


class MemoryChannel:
    """One end of a connection inside this process. Messages are pickled, so that both ends share no state."""

    def __init__(self) -> None:
        self._arrived: deque[bytes] = deque()
        self._other = self

    @classmethod
    def pair(cls) -> tuple[MemoryChannel, MemoryChannel]:
        """Return the two ends of a new connection."""
        one, other = cls(), cls()
        one._other, other._other = other, one
        return one, other

    def send(self, message: Any) -> None:
        """Send a message to the other end."""
        self._other._arrived.append(pickle.dumps(message, _PROTOCOL))

    def receive(self) -> list[Any]:
        """Return the messages that have arrived."""
        return [pickle.loads(self._arrived.popleft()) for _ in range(len(self._arrived))]
