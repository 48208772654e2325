"""Celery's Redis transport, which pauses while the server refuses writes, instead of ending the process.

A server with a full disk or memory, or one that has become a replica, rejects writes with an error that kombu takes for
a bug. Ignoring it is safe: a message that can't be consumed stays in its queue, and one that can't be acknowledged is
delivered again and has no effect.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, Final

from kombu.transport import redis, virtual
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

log = logging.getLogger(__name__)

_FIRST_S, _LONGEST_S = 0.5, 10.0
_PROBE: Final = "probe"  # key of test writes
_REFUSALS: Final = re.compile(r"\b(MISCONF|NOREPLICAS|READONLY|OOM|MASTERDOWN|UNBLOCKED)\b")


def refuses_to_write(error: BaseException) -> bool:
    """Return whether an error means that the server can't write now, rather than that a command is wrong."""
    if isinstance(error, (OutOfMemoryError, ReadOnlyError)):
        return True
    return isinstance(error, ResponseError) and _REFUSALS.search(str(error)) is not None


class Pause:
    """Exponential backoff while the server refuses writes. Logs once when it begins and once when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._ends_at = float("-inf")
        self._on = False

    @property
    def on(self) -> bool:
        """True from the first refusal until a write succeeds."""
        return self._on

    @property
    def over(self) -> bool:
        """True when the server may be tried again."""
        return time.monotonic() >= self._ends_at

    def refused(self, error: BaseException) -> None:
        """Begin a pause, or extend it."""
        with self._lock:
            if not self.over:
                return
            self._next_s = min(max(_FIRST_S, 2 * self._next_s), _LONGEST_S)
            self._ends_at = time.monotonic() + self._next_s
            was_on, self._on = self._on, True
        if not was_on:
            log.warning(
                "The Redis server refuses writes: %s; messages wait until it accepts them. Check its disk and memory",
                error,
                extra={"action": "redis_refuses"},
            )

    def end(self) -> None:
        """End the pause: a write has succeeded."""
        with self._lock:
            self._on, self._next_s = False, 0.0
        log.info("The Redis server accepts writes again", extra={"action": "redis_writes"})


_pause = Pause()  # one per process, which has one server


def _ignore_refusal(error: ResponseError) -> None:
    """Begin a pause if the server refused a write; raise any other error."""
    if not refuses_to_write(error):
        raise error
    _pause.refused(error)


@contextmanager
def _ignoring_refusals() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        _ignore_refusal(error)


class _QoS(redis.QoS):
    def append(self, message: Any, delivery_tag: Any) -> None:
        """Register a consumed message; if Redis can't store its copy, process it anyway."""
        try:
            super().append(message, delivery_tag)
        except ResponseError as error:
            _ignore_refusal(error)
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge a message; if Redis refuses, it is delivered again later."""
        try:
            super().ack(delivery_tag)
        except ResponseError as error:
            _ignore_refusal(error)
            virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Return a message; if Redis refuses, it is delivered again later."""
        try:
            super().reject(delivery_tag, requeue=requeue)
        except ResponseError as error:
            _ignore_refusal(error)
            virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, *given: Any, **named: Any) -> Any:
        """Return messages of dead consumers to their queues."""
        with _ignoring_refusals():
            return super().restore_visible(*given, **named)

    def restore_unacked(self, client: Any = None) -> None:
        """Return our own unacknowledged messages at shutdown."""
        with _ignoring_refusals():
            super().restore_unacked(client)


class _PausableChannel(redis.Channel):
    QoS = _QoS

    def _brpop_start(self, timeout: Any = None) -> None:
        if not _pause.on or (_pause.over and self._accepts_writes()):
            super()._brpop_start(timeout)

    def _accepts_writes(self) -> bool:
        """Try a write. A server without memory would let messages be consumed but not copied, so don't consume any."""
        try:
            with self.conn_or_acquire() as client:
                client.set(_PROBE, "", ex=60)
        except ResponseError as error:
            _ignore_refusal(error)
            return False
        _pause.end()
        return True

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except ResponseError as error:
            _ignore_refusal(error)
            raise Empty from error

    def _queue_bind(self, *given: Any) -> None:
        with _ignoring_refusals():  # the default exchange works without bindings
            super()._queue_bind(*given)

    def maybe_refresh_binding_expiry(self) -> None:
        """Renew the expiry of our queues' bindings."""
        with _ignoring_refusals():
            super().maybe_refresh_binding_expiry()

    def _delete(self, *given: Any, **named: Any) -> None:
        with _ignoring_refusals():
            super()._delete(*given, **named)


class Transport(redis.Transport):
    """Redis transport whose channels pause."""

    Channel = _PausableChannel
