"""The engine's loop and the request loop in one thread: each step's results are written before the next step."""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any

from worker.serving.engine_loop import EngineLoop
from worker.serving.requests.request_loop import RequestLoop


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
        self._other._arrived.append(pickle.dumps(message))

    def receive(self) -> list[Any]:
        """Return the messages that have arrived."""
        return [pickle.loads(self._arrived.popleft()) for _ in range(len(self._arrived))]


class Runner:
    """Serve requests with an engine in this thread."""

    def __init__(self, engine: EngineLoop, requests: RequestLoop) -> None:
        """Take the two ends of a MemoryChannel."""
        self._engine = engine
        self._requests = requests
        engine.run_once()  # its first report says what it can take

    @property
    def busy(self) -> bool:
        """True while requests are active or compared, and while more may be waiting in the database."""
        return self._requests.busy or self._engine.busy

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._engine.learned

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the start and what the worker holds now, as JSON."""
        return {**self._engine.stats, "requests": self._requests.num_requests}

    def run_once(self, *, notified: bool = False) -> None:
        """Claim requests, run one step, flush what is due. Raises DatabaseUnavailable: call again later."""
        if notified:
            self._requests.notify()
        self._requests.admit()
        self._engine.run_once()
        self._requests.collect()

    def hand_back(self) -> None:
        """Commit all progress and release every request, so that another worker continues it."""
        self._engine.stop()
        self._requests.hand_back()
