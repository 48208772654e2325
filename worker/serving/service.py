"""Run the engine thread and the housekeeping thread of a worker process, and its request process, from start to drain.

A notification wakes the engine thread, which passes it on to the request process. The request process renews leases
while the engine reports, so they expire when a step hangs. The housekeeping thread sends heartbeats while the engine
makes progress, kills a request process that hangs, and exits the process when it is stuck itself. A dead request
process is replaced.
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
from dataclasses import replace
from typing import Any

from jobs.errors import DatabaseUnavailable
from jobs.process_identity import identity
from jobs.processes import RESTART_STATUS
from jobs.producer import Notify
from jobs.streaming.pubsub import Publisher
from jobs.upkeep.reconciler import Reconciler
from storage import numerics, writes
from storage.records import NewWorker
from storage.session import DATABASE_UNAVAILABLE, LONG_STATEMENT_TIMEOUT_S, Database, unavailable_reason
from worker.loading.loader import LoadedModel
from worker.serving.cache_scope import cache_scope
from worker.serving.energy import BusyPower, device_meter
from worker.serving.engine_loop import EngineLoop
from worker.serving.messages import Setup
from worker.serving.request_process import RequestProcess
from worker.serving.speculation_store import SpeculationStore
from worker.serving.watchdog import Watchdog
from worker.settings import WorkerSettings
from worker.sharing.access import DeviceAccess, SoleAccess

log = logging.getLogger(__name__)

_IDLE_S = 0.5  # longest wait without work
_READY_S = 60.0  # longest wait for the first start of the request process
_MAX_FAILED_STARTS = 5  # of a request process that has never served
_HELD_BACK_S = 0.05  # longest wait for the request process to read reports
_HOUSEKEEPING_S = 5.0
_STATS_S = 1.0  # between two snapshots of the runner's statistics
_DATABASE_RETRY_S = 2.0
_MARK_STOPPED_S = 2.0
_DRAIN_FAILED_STATUS = 1  # exit status when the engine did not stop within drain_s

Pulse = Callable[[], bool]  # send a message to this worker itself; return whether Redis took it


class EngineService:
    """Own the engine thread and the housekeeping thread of a worker process."""

    def __init__(
        self,
        settings: WorkerSettings,
        loaded: LoadedModel,
        notify: Notify,
        requests: RequestProcess | None = None,
        access: DeviceAccess | None = None,
        *,
        worker_id: str = "",
    ) -> None:
        """Prepare the service for the loaded models; `start` starts its threads.

        `requests` is a request process that was started while the models were loaded, and `access` that to the device.
        """
        self._access = access or SoleAccess()
        self.worker_id = worker_id or new_worker_id()
        self._settings = settings
        self._loaded = loaded
        self._database = Database.open(settings.resolved_database_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
        self._publisher = Publisher(settings.redis_url)
        self._reconciler = Reconciler(self._database, self._publisher.publish, notify, lease_s=settings.lease_s)
        self._watchdog = Watchdog(settings.stall_s, settings.deaf_s)
        self._pulse: Pulse = lambda: False
        self._iterations = 0
        self._progressed = False
        self._learned: dict[str, Any] = {}
        self._stats: dict[str, Any] = {}
        self._stats_at = float("-inf")
        self._speculation_store = SpeculationStore(self._database, loaded.draft_identity)
        self._meter = device_meter()
        self._power, self._metered_at = BusyPower(settings.power_w), time.monotonic()
        self._joules = 0.0
        self._requests = requests or RequestProcess()
        self._wake = self._requests.news
        self._notified = False
        self._stop = threading.Event()
        self._engine_thread = threading.Thread(target=self._serve_or_exit, name="basic-engine", daemon=True)
        self._housekeeping = threading.Thread(target=self._housekeeping_loop, name="basic-housekeeping", daemon=True)

    def start(self, pulse: Pulse | None = None) -> None:
        """Register the worker and start serving. `pulse` sends a message that arrives at `pulse_received`."""
        self._pulse = pulse or self._pulse
        self._requests.set_up(self._setup())
        learned = self._speculation_store.read(self._loaded.speculation_state)
        self._loaded = replace(self._loaded, speculation_state=learned)
        refusal = self._loaded.grammars.refusal()  # reads the vocabulary now: the first grammar should not wait
        if refusal:
            log.warning("This model decodes no grammars: %s", refusal, extra={"action": "grammars_refused"})
        self._requests.wait_until_ready(_READY_S)  # a registered worker is one that serves
        with self._database.write() as session:
            numerics.record(session, self._loaded.numerics)
            writes.register_worker(session, self._registration())
        self._engine_thread.start()
        self._housekeeping.start()
        self._reconciler.start()

    def wake(self) -> None:
        """Claim work now: a notification has arrived."""
        self._notified = True
        self._wake.set()

    def pulse_received(self) -> None:
        """Record that the pulse arrived: the Celery consumer receives messages."""
        self._watchdog.pulse_received()

    def stop(self) -> None:
        """Finish the step, commit, release every request, and close; safe to call twice.

        Exits the process if the engine does not stop within `drain_s`: its leases expire then.
        """
        if self._stop.is_set():
            return
        ends_at = time.monotonic() + self._settings.drain_s
        self._stop.set()
        if self._engine_thread.ident is None:  # it was never started
            return
        self._wake.set()
        self._engine_thread.join(self._settings.drain_s)
        if self._engine_thread.is_alive():
            self._mark_stopped()
            _exit(
                _DRAIN_FAILED_STATUS,
                f"the engine did not stop in {self._settings.drain_s:.0f} s; other workers continue its requests "
                "when their leases expire",
            )
        self._reconciler.stop()
        self._housekeeping.join(max(0.0, ends_at - time.monotonic()))
        self._publisher.close()
        self._database.dispose()

    def _serve_or_exit(self) -> None:
        try:
            self._serve()
        except BaseException:  # also panics of Rust: without its engine the process must not look alive
            log.exception("The engine failed", extra={"action": "engine_failed"})
            _exit(RESTART_STATUS, "the engine failed")

    def _serve(self) -> None:
        loop = self._engine_loop()
        while not self._stop.is_set():
            self._iterations += 1
            notified, self._notified = self._notified, False
            try:
                if self._requests.dead:
                    self._replace_requests(loop)
                loop.run_once(notified=notified)
                self._update_stats(loop)
            except (DatabaseUnavailable, *DATABASE_UNAVAILABLE) as error:
                log.warning("The engine waits for the database: %s", unavailable_reason(error), extra=_AWAY)
                self._wake.clear()
                self._wake.wait(_DATABASE_RETRY_S * random.uniform(0.5, 1.5))
            else:
                if (loop.held_back or not loop.busy) and not self._notified:
                    self._wake.wait(_HELD_BACK_S if loop.busy else _IDLE_S)
        loop.stop()
        self._speculation_store.snapshot(self._loaded.speculation_state, now=True)
        if self._requests.hand_back(0.8 * self._settings.drain_s):
            self._mark_stopped()
        else:
            log.warning("The requests were not released in time; their leases will expire", extra=_STOPPING)

    def _replace_requests(self, loop: EngineLoop) -> None:
        """Requeue the requests of a dead request process, and start another."""
        status = self._requests.kill()
        loop.stop()
        self._reconciler.requeue(self.worker_id)
        delay_s = min(self._requests.restart_delay_s(), self._settings.stall_s / 4)
        if self._requests.failed_starts > _MAX_FAILED_STARTS:
            raise RuntimeError(f"the request process can't start: exit status {status}")
        log.error(
            "The request process exited with status %d; starting another in %.1f s",
            status,
            delay_s,
            extra={"action": "request_process_died"},
        )
        self._stop.wait(delay_s)
        self._requests.restart()
        self._requests.set_up(self._setup())
        loop.connect(self._requests.channel)

    def _update_stats(self, loop: EngineLoop) -> None:
        """Take a snapshot of what the engine has done and learned, on the engine thread, every `_STATS_S`."""
        if time.monotonic() - self._stats_at >= _STATS_S:
            self._stats_at = time.monotonic()
            self._stats, self._learned = loop.stats, loop.learned
            self._speculation_store.snapshot(self._loaded.speculation_state)

    def _housekeeping_loop(self) -> None:
        while not self._stop.wait(min(_HOUSEKEEPING_S, self._settings.deaf_s / 4) * random.uniform(0.8, 1.2)):
            self._check_progress()
            try:
                self._heartbeat()
            except DATABASE_UNAVAILABLE as error:
                log.warning("Housekeeping waits for the database: %s", unavailable_reason(error), extra=_AWAY)
            except Exception:  # this thread is the watchdog: no error may end it
                log.exception("Housekeeping failed", extra={"action": "housekeeping_failed"})

    def _check_progress(self) -> None:
        channel = self._requests.channel
        if self._watchdog.record_heard(channel.heard_at, time.monotonic(), starting=not channel.heard):
            log.error("The request process hangs and is killed", extra={"action": "request_process_hangs"})
            self._requests.interrupt()
            return
        self._watchdog.pulse_sent(delivered=self._pulse(), now=time.monotonic())
        self._progressed = self._watchdog.record_iterations(self._iterations, time.monotonic())
        reason = self._watchdog.restart_reason(time.monotonic())
        if reason is not None:
            if self._progressed:  # a hanging step counts as a crash of its requests
                self._mark_stopped()
            _exit(RESTART_STATUS, reason)

    def _mark_stopped(self) -> None:
        """Mark the worker as stopped within `_MARK_STOPPED_S`, so that its exit is not blamed on its requests."""
        thread = threading.Thread(target=self._stop_worker, name="basic-leaving", daemon=True)
        thread.start()
        thread.join(_MARK_STOPPED_S)

    def _stop_worker(self) -> None:
        try:
            with self._database.write() as session:
                writes.mark_stopped(session, self.worker_id)
            self._speculation_store.write()
        except DATABASE_UNAVAILABLE as error:
            log.warning("Could not mark this worker as stopped: %s", unavailable_reason(error), extra=_STOPPING)

    def _heartbeat(self) -> None:
        """Write the heartbeat, statistics, energy and learned state, while the engine makes progress."""
        if not self._progressed:
            return
        joules = self._read_energy()
        with self._database.write() as session:
            writes.record_heartbeat(session, self.worker_id)
            writes.update_calibration(session, self.worker_id, {**self._loaded.costs.as_json(), **self._learned})
            writes.update_load(
                session,
                self.worker_id,
                {**self._stats, **self._capacity(), "joules": self._joules + joules, **self._power.as_json()},
            )
            if joules:
                writes.add_energy(session, self.worker_id, time.time(), joules)
        self._joules += joules
        self._speculation_store.write()

    def _read_energy(self) -> float:
        """Return the joules since the last heartbeat."""
        share = self._access.energy_share()  # the meter counts what the whole device draws
        joules = share * self._meter.joules() if self._meter else 0.0
        now = time.monotonic()
        self._power.take(joules, now - self._metered_at, self._stats.get("step_ms", 0.0) / 1e3)
        self._metered_at = now
        return joules

    def _capacity(self) -> dict[str, Any]:
        options = self._loaded.options
        return {
            "max_sequences": options.max_sequences,
            "reserved_sequences": self._setup().reserved,
            "kv_capacity_tokens": options.total_kv_tokens,
            "capture_failures": self._loaded.target.capture_failures,
        }

    def _engine_loop(self) -> EngineLoop:
        return EngineLoop(
            self._loaded.engine,
            self._loaded.codec,
            self._database,
            self._requests.channel,
            worker_id=self.worker_id,
            model=self._loaded.name,
            lease_s=self._settings.lease_s,
            access=self._access,
        )

    def _setup(self) -> Setup:
        return Setup(
            settings=self._settings,
            worker_id=self.worker_id,
            model=self._loaded.name,
            codec=self._loaded.codec.options,
            # An engine with a single slot reserves none.
            reserved=min(self._settings.interactive_sequences, self._loaded.options.max_sequences - 1),
            numerics=self._loaded.numerics.fingerprint,
            cache_scope=cache_scope(self._loaded) if self._settings.cache != "off" else None,
        )

    def _registration(self) -> NewWorker:
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
            numerics=self._loaded.numerics.fingerprint,
        )


def new_worker_id() -> str:
    """Return an id that is new for each start, so that a restart inherits no lease."""
    return f"worker-{uuid.uuid4().hex}"


def _exit(status: int, why: str) -> None:
    """Exit the process at once, without waiting for its threads."""
    log.error("The process exits: %s", why, extra={"action": "process_ends"})
    logging.shutdown()
    os._exit(status)


_AWAY = {"action": "database_away"}
_STOPPING = {"action": "stop"}
