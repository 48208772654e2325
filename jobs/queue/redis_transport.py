"""Celery's Redis transport, which pauses while the server refuses to write instead of ending the process.

A server whose disk or memory is full, or that has become a replica, answers and refuses: with an error that kombu takes
for a fault of the program. What it refuses here costs nothing: a message that can't be taken stays where it is, and one
that can't be acknowledged comes again and adds nothing.
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
_PROBE: Final = "probe"  # a key that is written to learn whether the server writes again
_REFUSALS: Final = re.compile(r"\b(MISCONF|NOREPLICAS|READONLY|OOM|MASTERDOWN|UNBLOCKED)\b")


def refuses_to_write(error: BaseException) -> bool:
    """Return whether a server says that it can't write now, rather than that a command is wrong."""
    if isinstance(error, (OutOfMemoryError, ReadOnlyError)):
        return True
    return isinstance(error, ResponseError) and _REFUSALS.search(str(error)) is not None


class Pause:
    """How long a server that refuses to write is left alone: longer each time, told once."""

    def __init__(self) -> None:
        """Begin without one."""
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._ends_at = float("-inf")
        self._on = False

    @property
    def on(self) -> bool:
        """True from the first refusal until a write is taken."""
        return self._on

    @property
    def over(self) -> bool:
        """True when the server may be asked again."""
        return time.monotonic() >= self._ends_at

    def refused(self, error: BaseException) -> None:
        """Begin a pause, or a longer one."""
        with self._lock:
            if not self.over:
                return
            self._next_s = min(max(_FIRST_S, 2 * self._next_s), _LONGEST_S)
            self._ends_at = time.monotonic() + self._next_s
            told, self._on = self._on, True
        if not told:
            log.warning(
                "The Redis server refuses to write: %s; messages wait until it does again. Look at its disk and memory",
                error,
                extra={"action": "redis_refuses"},
            )

    def end(self) -> None:
        """Note that the server has taken a write."""
        with self._lock:
            self._on, self._next_s = False, 0.0
        log.info("The Redis server writes again", extra={"action": "redis_writes"})


_pause = Pause()  # of this process: it has one server


def _endure(error: ResponseError) -> None:
    """Leave undone what a server refuses to write; raise any other error."""
    if not refuses_to_write(error):
        raise error
    _pause.refused(error)


@contextmanager
def _enduring() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        _endure(error)


class _QoS(redis.QoS):
    def append(self, message: Any, delivery_tag: Any) -> None:
        """Note a message that was taken; without a copy in Redis it is worked on all the same."""
        try:
            super().append(message, delivery_tag)
        except ResponseError as error:
            _endure(error)
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge a message; if that is refused it comes again later."""
        try:
            super().ack(delivery_tag)
        except ResponseError as error:
            _endure(error)
            virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Give a message back; if that is refused it comes again later."""
        try:
            super().reject(delivery_tag, requeue=requeue)
        except ResponseError as error:
            _endure(error)
            virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, *given: Any, **named: Any) -> Any:
        """Give back what consumers that are gone had taken."""
        with _enduring():
            return super().restore_visible(*given, **named)

    def restore_unacked(self, client: Any = None) -> None:
        """Give back what we had taken, at the end."""
        with _enduring():
            super().restore_unacked(client)


class _Channel(redis.Channel):
    QoS = _QoS

    def _brpop_start(self, timeout: Any = None) -> None:
        if not _pause.on or (_pause.over and self._is_written_to()):
            super()._brpop_start(timeout)

    def _is_written_to(self) -> bool:
        """Try a write. Without memory a server lets messages be taken but not noted: they are safer where they are."""
        try:
            with self.conn_or_acquire() as client:
                client.set(_PROBE, "", ex=60)
        except ResponseError as error:
            _endure(error)
            return False
        _pause.end()
        return True

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except ResponseError as error:
            _endure(error)
            raise Empty from error

    def _queue_bind(self, *given: Any) -> None:
        with _enduring():  # a message for the default exchange finds its list without
            super()._queue_bind(*given)

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the bindings of our queues from expiring."""
        with _enduring():
            super().maybe_refresh_binding_expiry()

    def _delete(self, *given: Any, **named: Any) -> None:
        with _enduring():
            super()._delete(*given, **named)


class Transport(redis.Transport):
    """The transport, with channels that pause."""

    Channel = _Channel
