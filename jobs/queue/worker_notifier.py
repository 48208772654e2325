"""Doorbells, rung from a thread of their own: whoever records a job never waits for Redis.

A server that hangs takes seconds to be given up. What is to be rung meanwhile rings afterwards, once a model: one
doorbell is enough for all jobs of a model.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jobs.producer import make_producer_app, ring

log = logging.getLogger(__name__)

_PAUSE_S = 0.02


class Doorbells:
    """The doorbells of all models on one Redis server."""

    def __init__(self, redis_url: str) -> None:
        """Nothing is connected, and no thread started, before the first doorbell is to be rung."""
        self._app = make_producer_app(redis_url)
        self._thread = ThreadPoolExecutor(1, "doorbells")
        self._lock = threading.Lock()
        self._to_ring: dict[str, str] = {}  # model: the newest of its jobs

    def ring(self, job_id: str, model: str) -> None:
        """See to it that a model's doorbell rings. Returns at once and never raises for the server's sake."""
        with self._lock:
            rings_anyway = model in self._to_ring
            self._to_ring[model] = job_id
        if not rings_anyway:
            self._thread.submit(self._ring, model)

    def _ring(self, model: str) -> None:
        with self._lock:
            job_id = self._to_ring.pop(model)
        try:
            ring(self._app, job_id, model)
        except Exception:  # nobody is there to be told: the workers find the job in SQL
            log.exception("A doorbell failed", extra={"action": "ring_failed", "job_id": job_id})
        time.sleep(_PAUSE_S)  # what is to be rung meanwhile rings once: a ring costs as much as the rest of a small job
