"""The engine's loop and the request loop in one thread, for tests: each step's results are written before the next."""

from __future__ import annotations

from typing import Any

from worker.serving.engine_loop import EngineLoop
from worker.serving.request_loop import RequestLoop


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
