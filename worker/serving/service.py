"""The resident engine: one per process, on a thread of its own, from load to drain.

Notifications wake it; it also polls SQL. The engine thread alone renews leases, so a step that hangs
lets them lapse; the housekeeping thread sends heartbeats only while the engine makes progress, and ends a stuck
process.
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

from jobs.errors import DatabaseUnavailable
from jobs.process_identity import identity
from jobs.processes import RESTART_STATUS
from jobs.producer import Notify
from jobs.streaming.pubsub import Publisher
from jobs.upkeep.reconciler import Reconciler
from storage import writes
from storage.records import NewWorker
from storage.session import DATABASE_UNAVAILABLE, LONG_STATEMENT_TIMEOUT_S, Database, unavailable_reason
from worker.loading.loader import LoadedModel
from worker.serving.energy import gpu_meter
from worker.serving.runner import Runner
from worker.serving.sink import Sink
from worker.serving.watchdog import Watchdog
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_IDLE_S = 1.0  # longest sleep without work
_HOUSEKEEPING_S = 5.0
_LOAD_S = 1.0  # between two looks at what the engine holds
_DATABASE_RETRY_S = 2.0
_HAND_BACK_RETRY_S = 0.5
_LEAVING_S = 2.0
_STOP_STATUS = 1  # of a process that did not stop in order

Pulse = Callable[[], bool]  # send a message to oneself; whether Redis took it


class EngineService:
    """Owns the engine thread and the housekeeping threads of a worker process."""

    def __init__(self, settings: WorkerSettings, loaded: LoadedModel, notify: Notify, *, worker_id: str = "") -> None:
        """Take loaded models; nothing runs before `start`."""
        self.worker_id = worker_id or new_worker_id()
        self._settings = settings
        self._loaded = loaded
        self._database = Database.open(settings.resolved_database_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
        self._publisher = Publisher(settings.redis_url)
        self._reconciler = Reconciler(self._database, self._publisher.publish, notify, lease_s=settings.lease_s)
        self._watchdog = Watchdog(settings.stall_s, settings.deaf_s)
        self._pulse: Pulse = lambda: False
        self._iterations = 0
        self._moved = False
        self._learned: dict[str, Any] = {}
        self._load: dict[str, Any] = {}
        self._load_at = float("-inf")
        self._meter = gpu_meter()
        self._joules = 0.0
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._engine_thread = threading.Thread(target=self._serve_or_end, name="basic-engine", daemon=True)
        self._housekeeping = threading.Thread(target=self._housekeeping_loop, name="basic-housekeeping", daemon=True)

    def start(self, pulse: Pulse | None = None) -> None:
        """Register the worker and begin to serve. `pulse` sends a message that ends in `heard`."""
        self._pulse = pulse or self._pulse
        with self._database.write() as session:
            writes.register_worker(session, self._card())
        self._engine_thread.start()
        self._housekeeping.start()
        self._reconciler.start()

    def wake(self) -> None:
        """Look for work now: somebody rang."""
        self._wake.set()

    def pulse_received(self) -> None:
        """Take note that our own message has come: the consumer is not deaf."""
        self._watchdog.pulse_received()

    def stop(self) -> None:
        """Finish the step, commit, hand every request back, and close; safe to call twice.

        Ends the process if the engine does not finish in time: its leases lapse then.
        """
        if self._stop.is_set():
            return
        ends_at = time.monotonic() + self._settings.drain_s
        self._stop.set()
        self._wake.set()
        self._engine_thread.join(self._settings.drain_s)
        if self._engine_thread.is_alive():
            self._note_leaving()
            _end(
                _STOP_STATUS,
                f"the engine did not stop in {self._settings.drain_s:.0f} s; its requests go on elsewhere "
                "when their leases have lapsed",
            )
        self._reconciler.stop()
        self._housekeeping.join(max(0.0, ends_at - time.monotonic()))
        self._publisher.close()
        self._database.dispose()

    def _serve_or_end(self) -> None:
        try:
            self._serve()
        except BaseException:  # also what Rust raises: without its engine a process must not look alive
            log.exception("The engine failed", extra={"action": "engine_failed"})
            _end(RESTART_STATUS, "the engine failed")

    def _serve(self) -> None:
        runner = self._runner()
        while not self._stop.is_set():
            self._iterations += 1
            notified = self._wake.is_set()
            self._wake.clear()
            try:
                runner.run_once(notified=notified)
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
        """Hand everything back; a database that is away may come back in time."""
        ends_at = time.monotonic() + 0.8 * self._settings.drain_s
        while True:
            try:
                runner.hand_back()
                with self._database.write() as session:
                    writes.mark_stopped(session, self.worker_id)
                return
            except (DatabaseUnavailable, *DATABASE_UNAVAILABLE) as error:
                if time.monotonic() > ends_at:
                    log.warning("Could not hand requests back, their leases will lapse: %s", error, extra=_STOPPING)
                    return
                time.sleep(_HAND_BACK_RETRY_S)

    def _housekeeping_loop(self) -> None:
        while not self._stop.wait(min(_HOUSEKEEPING_S, self._settings.deaf_s / 4) * random.uniform(0.8, 1.2)):
            self._watch()
            try:
                self._beat()
            except DATABASE_UNAVAILABLE as error:
                log.warning("Housekeeping waits for the database: %s", unavailable_reason(error), extra=_AWAY)
            except Exception:  # this thread is the watchdog: it must outlive whatever goes wrong here
                log.exception("Housekeeping failed", extra={"action": "housekeeping_failed"})

    def _watch(self) -> None:
        self._watchdog.pulse_sent(delivered=self._pulse(), now=time.monotonic())
        self._moved = self._watchdog.record_iterations(self._iterations, time.monotonic())
        verdict = self._watchdog.restart_reason(time.monotonic())
        if verdict is not None:
            if self._moved:  # not for a step that hangs
                self._note_leaving()
            _end(RESTART_STATUS, verdict)

    def _note_leaving(self) -> None:
        """Say that the end of this process is no fault of its requests; a database that is away need not know."""
        noting = threading.Thread(target=self._stop_worker, name="basic-leaving", daemon=True)
        noting.start()
        noting.join(_LEAVING_S)

    def _stop_worker(self) -> None:
        try:
            with self._database.write() as session:
                writes.mark_stopped(session, self.worker_id)
        except DATABASE_UNAVAILABLE as error:
            log.warning("Could not note that this worker leaves: %s", unavailable_reason(error), extra=_STOPPING)

    def _beat(self) -> None:
        """Write the heartbeat, the load and the learned state, as long as the engine makes progress."""
        if not self._moved:
            return
        joules = self._meter.joules() if self._meter else 0.0
        with self._database.write() as session:
            writes.record_heartbeat(session, self.worker_id)
            writes.update_calibration(session, self.worker_id, {**self._loaded.costs.as_json(), **self._learned})
            writes.update_load(
                session, self.worker_id, {**self._load, **self._capacity(), "joules": self._joules + joules}
            )
            if joules:
                writes.add_energy(session, self.worker_id, time.time(), joules)
        self._joules += joules

    def _capacity(self) -> dict[str, int]:
        options = self._loaded.options
        return {"max_sequences": options.max_sequences, "kv_capacity_tokens": options.total_kv_tokens}

    def _runner(self) -> Runner:
        sink = Sink(self._database, self._publisher.publish, self.worker_id, self._settings.lease_s)
        return Runner(
            self._loaded.engine,
            self._loaded.codec,
            sink,
            self._database,
            worker_id=self.worker_id,
            model=self._loaded.name,
            lease_s=self._settings.lease_s,
            interval_s=self._settings.partials_interval_s,
            # An engine with room for a single sequence keeps it for everybody.
            reserved=min(self._settings.interactive_sequences, self._loaded.options.max_sequences - 1),
        )

    def _card(self) -> NewWorker:
        return NewWorker(
            id=self.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            target=self._loaded.name,
            draft=self._loaded.draft,
            devices=(self._loaded.device,) * self._loaded.ranks,
            context_tokens=self._loaded.options.max_context,
            calibration=self._loaded.costs.as_json(),
            process=identity(),
        )


def new_worker_id() -> str:
    """Return an id for this start of the process, so that no restart inherits a lease."""
    return f"worker-{uuid.uuid4().hex}"


def _end(status: int, why: str) -> None:
    """End the process at once, whatever its threads do."""
    log.error("The process ends: %s", why, extra={"action": "process_ends"})
    logging.shutdown()
    os._exit(status)


_AWAY = {"action": "database_away"}
_STOPPING = {"action": "stop"}
