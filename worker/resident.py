"""The resident engine: one per process, on a thread of its own, from load to drain.

tasks -> [resident] -> runner.  Doorbells wake it; without any it looks into SQL by itself.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError

from jobs.errors import DatabaseUnavailable
from jobs.messages import job_events
from jobs.partials import Publisher
from storage import leases, writes
from storage.records import WorkerCard
from storage.session import Database
from worker.assembly import Assembly
from worker.energy import gpu_meter
from worker.runner import Runner
from worker.settings import WorkerSettings
from worker.sink import Sink

log = logging.getLogger(__name__)

_IDLE_S = 1.0  # longest sleep without work
_HOUSEKEEPING_S = 5.0
_LOAD_S = 1.0  # between two looks at what the engine holds
_RING_AFTER_S = 10.0  # a job whose queued requests nobody took up for so long is rung again
_DATABASE_RETRY_S = 2.0
_RESTART_STATUS = 75  # EX_TEMPFAIL of sysexits.h: another start may work

Ring = Callable[[str, str], object]  # (job_id, model)


class Resident:
    """Owns the engine thread and the housekeeping thread of a worker process."""

    def __init__(self, settings: WorkerSettings, assembly: Assembly, ring: Ring) -> None:
        """Take loaded models; nothing runs before `start`."""
        self.worker_id = (
            f"worker-{uuid.uuid4().hex}"  # of this start of the process, so that no restart inherits a lease
        )
        self._settings = settings
        self._assembly = assembly
        self._ring = ring
        self._database = Database.open(settings.resolved_database_url)
        self._publisher = Publisher(settings.redis_url)
        self._learned: dict[str, Any] = {}
        self._load: dict[str, Any] = {}
        self._load_at = float("-inf")
        self._meter = gpu_meter()
        self._joules = 0.0
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve_or_end, name="basic-engine", daemon=True),
            threading.Thread(target=self._keep_house, name="basic-housekeeping", daemon=True),
        ]

    def start(self) -> None:
        """Register the worker and begin to serve."""
        with self._database.write() as session:
            writes.register_worker(session, self._card())
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for work now: somebody rang."""
        self._wake.set()

    def stop(self) -> None:
        """Finish the step, commit, hand every request back, and close; safe to call twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        self._publisher.close()
        self._database.dispose()

    def _serve_or_end(self) -> None:
        try:
            self._serve()
        except Exception:  # a process whose engine is gone must not look alive: whoever supervises it starts it again
            log.exception(
                "The engine failed; the process ends, and its leases lapse", extra={"action": "engine_failed"}
            )
            logging.shutdown()
            os._exit(_RESTART_STATUS)

    def _serve(self) -> None:
        runner = self._runner()
        while not self._stop.is_set():
            rung = self._wake.is_set()
            self._wake.clear()
            try:
                runner.turn(rung=rung)
                self._learned = runner.learned
                self._note_load(runner)
            except DatabaseUnavailable as error:
                log.warning("Decoding pauses: %s", error, extra={"action": "database_away"})
                self._stop.wait(_DATABASE_RETRY_S * random.uniform(0.5, 1.5))
            else:
                if not runner.busy:
                    self._wake.wait(_IDLE_S * random.uniform(0.5, 1.0))
        self._leave(runner)

    def _note_load(self, runner: Runner) -> None:
        """Look at what the engine holds, from its own thread, now and then."""
        if time.monotonic() - self._load_at >= _LOAD_S:
            self._load_at = time.monotonic()
            self._load = runner.load

    def _leave(self, runner: Runner) -> None:
        try:
            runner.hand_back()
            with self._database.write() as session:
                writes.stop_worker(session, self.worker_id)
        except (DatabaseUnavailable, OperationalError, InterfaceError) as error:
            log.warning("Could not hand requests back, their leases will lapse: %s", error, extra={"action": "stop"})

    def _keep_house(self) -> None:
        while not self._stop.wait(_HOUSEKEEPING_S * random.uniform(0.8, 1.2)):
            try:
                self._tidy()
            except (OperationalError, InterfaceError) as error:
                log.warning("Housekeeping waits for the database: %s", error.orig, extra={"action": "database_away"})

    def _tidy(self) -> None:
        """What any worker may do for all: say it lives, end overdue jobs, ring again where nobody came."""
        joules = self._meter.joules() if self._meter else 0.0
        with self._database.write() as session:
            writes.beat_worker(session, self.worker_id)
            writes.update_calibration(session, self.worker_id, {**self._assembly.costs.as_json(), **self._learned})
            writes.note_load(
                session, self.worker_id, {**self._load, **self._capacity(), "joules": self._joules + joules}
            )
            if joules:
                writes.add_energy(session, self.worker_id, time.time(), joules)
            ended = writes.expire_jobs(session)
            unheard = leases.jobs_to_ring(session, _RING_AFTER_S)
        self._joules += joules
        self._publisher.publish(job_events(ended))
        for job_id, model in unheard:
            self._ring(job_id, model)

    def _capacity(self) -> dict[str, int]:
        options = self._assembly.options
        return {"max_sequences": options.max_sequences, "kv_capacity_tokens": options.total_kv_tokens}

    def _runner(self) -> Runner:
        sink = Sink(self._database, self._publisher.publish, self.worker_id, self._settings.lease_s)
        return Runner(
            self._assembly.engine,
            self._assembly.codec,
            sink,
            self._database,
            worker_id=self.worker_id,
            model=self._assembly.name,
            lease_s=self._settings.lease_s,
            interval_s=self._settings.partials_interval_s,
            # An engine with room for a single sequence keeps it for everybody.
            reserved=min(self._settings.interactive_sequences, self._assembly.options.max_sequences - 1),
        )

    def _card(self) -> WorkerCard:
        return WorkerCard(
            id=self.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            target=self._assembly.name,
            draft=self._assembly.draft,
            devices=(self._assembly.device,),
            context_tokens=self._assembly.options.max_context,
            calibration=self._assembly.costs.as_json(),
        )
