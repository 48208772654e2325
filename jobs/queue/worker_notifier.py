"""Notify workers of new work from a background thread, so that recording a job never waits for Redis.

A Redis server that hangs blocks a call for seconds. Notifications that pile up meanwhile are merged: one per model is
enough, since workers look for any job of their model.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jobs.producer import make_producer_app, notify_workers

log = logging.getLogger(__name__)

_MERGE_S = 0.02  # one notification costs as much as the rest of a small job, so merge those of this interval


class WorkerNotifier:
    """Notifies the workers of all models on one Redis server."""

    def __init__(self, redis_url: str) -> None:
        """Connect and start the thread only at the first notification."""
        self._app = make_producer_app(redis_url)
        self._thread = ThreadPoolExecutor(1, "worker-notifier")
        self._lock = threading.Lock()
        self._pending: dict[str, str] = {}  # model: id of its newest job

    def notify(self, job_id: str, model: str) -> None:
        """Notify the workers of a model in the background. Never block, and never raise for Redis errors."""
        with self._lock:
            is_pending = model in self._pending
            self._pending[model] = job_id
        if not is_pending:
            self._thread.submit(self._send, model)

    def _send(self, model: str) -> None:
        with self._lock:
            job_id = self._pending.pop(model)
        try:
            notify_workers(self._app, job_id, model)
        except Exception:  # no caller is left to raise to; the workers find the job in SQL
            log.exception("A worker notification failed", extra={"action": "ring_failed", "job_id": job_id})
        time.sleep(_MERGE_S)
