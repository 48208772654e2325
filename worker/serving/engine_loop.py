"""The engine's loop: receive sequences, run steps, report the results.

It handles token ids only; its one use of SQL is the speed-up check. Reports wait in the channel until the request loop
reads them. The engine pauses while more than `MAX_UNREAD_REPORTS` are unread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from jobs.errors import DatabaseUnavailable
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from worker.engine.engine import Engine
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stats import StepBatch
from worker.serving.channel import Channel
from worker.serving.messages import ActiveRequests, AddSequences, CancelSequences, EngineReport, ReportsRead, ToEngine
from worker.serving.resilient_engine import ResilientEngine
from worker.serving.speedup_check import SpeedupCheck
from worker.serving.worker_stats import WorkerStats
from worker.sharing.access import DeviceAccess, SoleAccess
from worker.text.codec import Codec

log = logging.getLogger(__name__)

MAX_UNREAD_REPORTS = 128  # with more unread reports, the engine pauses
_REPORT_S = 0.5  # longest time between two reports of an engine that is not paused


class EngineLoop:
    """Decode the sequences that arrive on a channel with one engine."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        codec: Codec,
        database: Database,
        channel: Channel,
        *,
        worker_id: str,
        model: str,
        lease_s: float,
        access: DeviceAccess | None = None,
    ) -> None:
        """Create an engine; `make_engine` is called again after a failed step. The first `run_once` sends a report.

        Steps wait for turns of `access` if other models share the device.
        """
        self._access = access or SoleAccess()
        self._engine = ResilientEngine(make_engine)
        self._channel = channel
        self._lease_s = lease_s
        self._speedup_check = SpeedupCheck(
            self._engine, codec, database, worker_id=worker_id, model=model, lease_s=lease_s
        )
        self._sequences: dict[int, EngineSequence] = {}  # unfinished, by number
        self.num_requests = 0  # that the request loop holds
        self._num_added = 0
        self._num_unread = 0  # reports
        self._reported: tuple[int, int] | None = None  # num_added and free_capacity of the last report
        self._reported_at = float("-inf")
        self._notified = False
        self._stats = WorkerStats()
        self._warned_slow = False

    @property
    def busy(self) -> bool:
        """True while there are sequences to decode or a speed-up check is running."""
        return bool(self._sequences) or self._speedup_check.busy

    @property
    def held_back(self) -> bool:
        """True while too many reports are unread: no step runs."""
        return self._num_unread >= MAX_UNREAD_REPORTS

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._engine.learned

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the start and what the engine holds now, as JSON."""
        return {"requests": self.num_requests, **self._stats.as_json(self._sequences.values())}

    def run_once(self, *, notified: bool = False) -> None:
        """Take what has arrived, run one step of it or of a speed-up check, and report.

        `notified` is passed on: new work may be waiting in the database.

        Raises DatabaseUnavailable if a speed-up check can't reach the database: call again later.
        """
        for message in self._channel.receive():
            self._take(message)
        self._notified |= notified
        if self.held_back or not self.busy:
            self._access.end_turn(more=False)
        elif not self._access.take_turn(_REPORT_S):
            self._report()  # other models have the device: this engine does not hang
            return
        if self.held_back:
            return
        if self._sequences:
            self._step()
            self._access.end_turn(more=bool(self._sequences))
        else:
            self._report()
            self._check_speedup()

    def _check_speedup(self) -> None:
        try:
            self._speedup_check.run_once()
        except DATABASE_UNAVAILABLE as error:
            raise DatabaseUnavailable(f"The database does not answer: {unavailable_reason(error)}") from error
        finally:
            self._access.end_turn(more=False)

    def connect(self, channel: Channel) -> None:
        """Drop all sequences, because the request process that held them has died, and serve another channel."""
        if self._sequences:
            self._engine.cancel({sequence.key for sequence in self._sequences.values()})
        self._sequences = {}
        self._channel = channel
        self._num_added = self._num_unread = self.num_requests = 0
        self._reported = None

    def stop(self) -> None:
        """Release a speed-up check that is running, and the device."""
        self._speedup_check.preempt()
        self._access.end_turn(more=False)

    def _take(self, message: ToEngine) -> None:
        match message:
            case AddSequences():
                self._speedup_check.preempt()
                for sequence in message.sequences:
                    self._sequences[sequence.number] = sequence
                    self._engine.add(sequence)
                self._num_added += len(message.sequences)
            case CancelSequences():
                keys = {self._sequences[number].key for number in message.numbers if number in self._sequences}
                if keys:
                    self._engine.cancel(keys)
                self._forget(message.numbers)
            case ReportsRead():
                self._num_unread -= message.count
            case ActiveRequests():
                self.num_requests = message.num_requests

    def _step(self) -> None:
        began_at = time.monotonic()
        results, given_up = self._engine.step()
        self._warn_of_slow_steps(time.monotonic() - began_at)
        self._stats.take(results)
        self._forget(results.finished.tolist())
        self._forget(sequence.number for sequence in given_up)
        refused = tuple((sequence.number, sequence.failure) for sequence in given_up)
        self._report(results if len(results) else None, refused)

    def _report(self, results: StepBatch | None = None, given_up: tuple[tuple[int, str], ...] = ()) -> None:
        """Send a report if there is something to tell, or if the last one is old."""
        now, state = time.monotonic(), (self._num_added, self._speedup_check.free_capacity)
        news = results is not None or given_up or self._notified or state != self._reported
        if not news and now - self._reported_at < _REPORT_S:
            return
        self._channel.send(EngineReport(*state, time.time(), self._notified, results, given_up))
        self._reported, self._reported_at, self._notified = state, now, False
        self._num_unread += 1

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._sequences.pop(number, None)

    def _warn_of_slow_steps(self, step_s: float) -> None:
        if step_s > self._lease_s / 2 and not self._warned_slow:
            self._warned_slow = True
            log.warning(
                "A step took %.1f s and leases last %.0f s; a step longer than a lease loses this worker its requests. "
                "Raise BASIC_LEASE_S",
                step_s,
                self._lease_s,
                extra={"action": "slow_step"},
            )
